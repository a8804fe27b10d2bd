//! Making a new image.
//!
//! Layout: header, refcount table, refcount blocks, L1 table, one after the other from cluster 0. Everything but the
//! first sector is written and made durable before that sector is: a crash leaves no file that opens as half an image.

use std::path::Path;

use super::options::CreateOptions;
use crate::error::{Error, IoOp, Result};
use crate::format::header::{
    COMPATIBLE_LAZY_REFCOUNTS, Encryption, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_EXTENDED_L2, L1_ENTRIES_MAX,
};
use crate::format::{BackingName, Compression, Geometry, Header, HostOffset, extension, refcount};
use crate::storage::file::FileStorage;
use crate::storage::lock::LockMode;
use crate::storage::{Blocking, Io, IoSrc, Storage};
use crate::wait::block_on;

/// The part of the header that is written last, and as a whole.
const SECTOR_BYTES: usize = 512;
/// The size of a disk is rounded up to this, as `qemu-img` does: others count disks in sectors.
const SIZE_UNIT_BYTES: u64 = 512;
/// Clusters from which on QEMU stores the feature name table; smaller ones are left to the backing file name.
const FEATURE_NAMES_CLUSTER_BYTES_MIN: u64 = 8192;

/// Where everything goes, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Layout {
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_clusters: u64,
}

impl Layout {
    /// The smallest layout whose refcount blocks count all clusters of it, themselves included.
    fn new(geometry: Geometry, l1_entries: u64) -> Self {
        let mut layout =
            Self { refcount_table_clusters: 1, refcount_blocks: 1, l1_clusters: geometry.clusters_for(l1_entries * 8) };
        loop {
            // Both only grow, and each by less than what made it grow: this ends.
            let blocks = layout.total().div_ceil(geometry.refcount_block_entries());
            let table = geometry.clusters_for(blocks * 8);
            if (blocks, table) == (layout.refcount_blocks, layout.refcount_table_clusters) {
                return layout;
            }
            (layout.refcount_blocks, layout.refcount_table_clusters) = (blocks, table);
        }
    }

    fn total(self) -> u64 {
        self.blocks_at() + self.refcount_blocks + self.l1_clusters
    }

    /// First cluster of the refcount blocks; the table begins at cluster 1.
    fn blocks_at(self) -> u64 {
        1 + self.refcount_table_clusters
    }

    fn l1_at(self) -> u64 {
        self.blocks_at() + self.refcount_blocks
    }
}

/// A new image before anything of it is written: all that can be wrong with the request is known by now.
struct Plan {
    geometry: Geometry,
    layout: Layout,
    header: Vec<u8>,
}

impl Plan {
    fn new(size_bytes: u64, options: &CreateOptions) -> Result<Self> {
        let geometry = options.geometry()?;
        // A power of two times the largest L1 table: at most 2^61, so that the rounding cannot overflow.
        let limit = L1_ENTRIES_MAX * geometry.l2_table_covers_bytes();
        if size_bytes > limit {
            return Err(Error::TooLarge { what: "size of a disk with this cluster size", limit });
        }
        let size_bytes = size_bytes.next_multiple_of(SIZE_UNIT_BYTES);
        let l1_entries = geometry.l1_entries_for(size_bytes);
        let layout = Layout::new(geometry, l1_entries);
        let header = header(size_bytes, l1_entries, geometry, layout, options).encode()?;
        Ok(Self { geometry, layout, header })
    }

    /// What lies between the header and the L1 table: the refcount table, padded, and its blocks.
    fn refcounts(&self) -> Vec<u8> {
        let (geometry, layout) = (self.geometry, self.layout);
        let cluster = geometry.cluster_size_bytes();
        // A few clusters, or 1/64 of an L1 table that is at most 32 MiB: this fits into memory.
        let table_bytes = (layout.refcount_table_clusters * cluster) as usize;
        let mut bytes = vec![0; table_bytes + (layout.refcount_blocks * cluster) as usize];
        let (table, blocks) = bytes.split_at_mut(table_bytes);
        for (i, entry) in table.chunks_exact_mut(8).take(layout.refcount_blocks as usize).enumerate() {
            entry.copy_from_slice(&((layout.blocks_at() + i as u64) * cluster).to_be_bytes());
        }
        let mut left = layout.total();
        for block in blocks.chunks_exact_mut(cluster as usize) {
            let used = left.min(geometry.refcount_block_entries());
            for index in 0..used as usize {
                refcount::set(block, geometry.refcount_order, index, 1);
            }
            left -= used;
        }
        bytes
    }
}

fn header(size_bytes: u64, l1_entries: u64, geometry: Geometry, layout: Layout, options: &CreateOptions) -> Header {
    let cluster = geometry.cluster_size_bytes();
    let bit = |on: bool, mask: u64| if on { mask } else { 0 };
    let (header_length, unknown_fields) = Header::new_length(geometry.version);
    let names = geometry.version >= 3 && cluster >= FEATURE_NAMES_CLUSTER_BYTES_MIN;
    Header {
        geometry,
        size_bytes,
        backing: options.backing_file.as_ref().map(|name| BackingName {
            name: name.clone(),
            format: options.backing_fmt.map(|format| format.name().to_owned()),
        }),
        encryption: Encryption::None,
        l1_entries: l1_entries as u32, // at most L1_ENTRIES_MAX
        l1_offset: HostOffset(if l1_entries == 0 { 0 } else { layout.l1_at() * cluster }),
        refcount_table_offset: HostOffset(cluster),
        refcount_table_clusters: layout.refcount_table_clusters as u32,
        snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: bit(geometry.extended_l2, INCOMPATIBLE_EXTENDED_L2)
            | bit(options.compression_type != Compression::Zlib, INCOMPATIBLE_COMPRESSION),
        compatible: bit(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS),
        autoclear: 0,
        compression: options.compression_type,
        header_length,
        unknown_fields,
        extensions: if names { vec![extension::feature_names()] } else { Vec::new() },
    }
}

/// Makes an image in a storage, of which nothing remains.
///
/// The size is rounded up to a multiple of 512 bytes. The backing file is not opened.
pub async fn create_with<I: Io>(io: &I, storage: &dyn Storage, size_bytes: u64, options: &CreateOptions) -> Result<()> {
    let plan = Plan::new(size_bytes, options)?;
    write_image(io, storage, &plan).await
}

async fn write_image<I: Io>(io: &I, storage: &dyn Storage, plan: &Plan) -> Result<()> {
    let cluster = plan.geometry.cluster_size_bytes();
    let truncate = |size| storage.truncate(size).map_err(|e| Error::io(IoOp::Truncate, size, &e));
    // Old contents first: the L1 table and what follows the header rely on zeroes. The empty file is made durable, so
    // that no old header can meet new tables.
    truncate(0)?;
    flush(io, storage).await?;
    truncate(plan.layout.total() * cluster)?;
    write(io, storage, &plan.refcounts(), cluster).await?;
    let (first, rest) = plan.header.split_at(plan.header.len().min(SECTOR_BYTES));
    if !rest.is_empty() {
        write(io, storage, rest, SECTOR_BYTES as u64).await?;
    }
    flush(io, storage).await?;
    write(io, storage, first, 0).await?;
    flush(io, storage).await
}

async fn write<I: Io>(io: &I, storage: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    io.write(storage, &[IoSrc::from(bytes)], offset).await.map_err(|e| Error::io(IoOp::Write, offset, &e))
}

async fn flush<I: Io>(io: &I, storage: &dyn Storage) -> Result<()> {
    io.flush(storage).await.map_err(|e| Error::io(IoOp::Flush, 0, &e))
}

/// Makes an image in a file. A file that exists is refused, or replaced with `overwrite`; nothing is touched if the
/// options cannot be had, and a file that was made here is removed again if it cannot be completed.
pub fn create(path: &Path, size_bytes: u64, options: &CreateOptions, overwrite: bool) -> Result<()> {
    let plan = Plan::new(size_bytes, options)?;
    let (file, made_here) = open_file(path, overwrite)?;
    let storage = FileStorage::new(file);
    // Not being able to lock is no reason to fail; that somebody uses the file is. The lock goes with the file.
    if matches!(storage.lock(LockMode::Writer), Ok(false)) {
        return Err(Error::Locked { name: path.display().to_string() });
    }
    let result = block_on(write_image(&Blocking, &storage, &plan));
    if result.is_err() && made_here {
        // The error of the creation is what the caller has to know; if this fails too, an empty file is left.
        let _ = std::fs::remove_file(path);
    }
    result
}

/// Opens the file to write to, and says whether it was made here.
fn open_file(path: &Path, overwrite: bool) -> Result<(std::fs::File, bool)> {
    let failed = |e: &std::io::Error| Error::open(path, e);
    let shown = || path.display().to_string();
    let mut open = std::fs::OpenOptions::new();
    open.read(true).write(true);
    match open.clone().create_new(true).open(path) {
        Ok(file) => return Ok((file, true)),
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed(&e)),
        Err(_) if !overwrite => return Err(Error::Exists { path: shown() }),
        Err(_) => {}
    }
    // Before the open, which would wait on a named pipe.
    if !std::fs::metadata(path).map_err(|e| failed(&e))?.is_file() {
        return Err(Error::Path { path: shown(), why: "is not a regular file, and only those can be replaced" });
    }
    Ok((open.open(path).map_err(|e| failed(&e))?, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::load_header;
    use crate::image::options::{BackingFormat, Compat};
    use crate::storage::memory::MemoryStorage;

    fn made(size: u64, options: &CreateOptions) -> (Header, Vec<u8>) {
        let storage = MemoryStorage::new(vec![0xa5; 1 << 20]);
        block_on(create_with(&Blocking, &storage, size, options)).unwrap();
        let header = block_on(load_header(&Blocking, &storage)).unwrap();
        let bytes = storage.snapshot();
        header.check_supported().unwrap();
        header.check_placement(bytes.len() as u64).unwrap();
        (header, bytes)
    }

    #[test]
    fn default_layout() {
        let (header, bytes) = made(1 << 20, &CreateOptions::default());
        assert_eq!(header.refcount_table_offset, HostOffset(0x10000));
        assert_eq!(bytes[0x10000..0x10008], 0x20000u64.to_be_bytes());
        assert_eq!(bytes[0x20000..0x2000a], [0, 1, 0, 1, 0, 1, 0, 1, 0, 0]);
        assert_eq!((header.l1_offset, header.l1_entries), (HostOffset(0x30000), 1));
        assert_eq!(bytes.len(), 0x40000);
        assert!(bytes[0x30000..].iter().all(|&b| b == 0), "old contents of the storage show through");
    }

    #[test]
    fn small_clusters_with_wide_refcounts_need_several_blocks_and_table_clusters() {
        let options = CreateOptions { cluster_size_bytes: 512, refcount_bits: 64, ..Default::default() };
        let (header, bytes) = made(128 << 30, &options);
        assert_eq!(u64::from(header.l1_entries), L1_ENTRIES_MAX);
        let layout = Layout::new(header.geometry, L1_ENTRIES_MAX);
        assert!(layout.refcount_table_clusters > 1 && layout.refcount_blocks > 1000, "{layout:?}");
        assert_eq!(bytes.len() as u64, layout.total() * 512);
        // One block fewer would not count every cluster.
        let entries = header.geometry.refcount_block_entries();
        assert!((layout.refcount_blocks - 1) * entries < layout.total());
        assert!(layout.refcount_blocks * entries >= layout.total());
    }

    #[test]
    fn sizes_are_rounded_up_to_sectors_and_capped() {
        assert_eq!(made(0, &CreateOptions::default()).0.size_bytes, 0);
        assert_eq!(made(1, &CreateOptions::default()).0.size_bytes, 512);
        assert_eq!(made(1000, &CreateOptions::default()).0.size_bytes, 1024);
        let options = CreateOptions { cluster_size_bytes: 512, ..Default::default() };
        let storage = MemoryStorage::default();
        for size in [(128 << 30) + 1, u64::MAX] {
            let e = block_on(create_with(&Blocking, &storage, size, &options)).unwrap_err();
            assert!(matches!(e, Error::TooLarge { limit: 137_438_953_472, .. }), "{e}");
        }
        assert_eq!(storage.snapshot().len(), 0, "refused, and nothing written");
    }

    #[test]
    fn a_backing_file_name_has_to_fit_into_the_first_cluster() {
        let mut options = CreateOptions {
            cluster_size_bytes: 512,
            backing_file: Some("b".repeat(376)),
            backing_fmt: Some(BackingFormat::Qcow2),
            ..Default::default()
        };
        let (header, _) = made(4096, &options);
        assert_eq!(header.backing.unwrap().name.len(), 376);
        options.backing_file = Some("b".repeat(377));
        let e = block_on(create_with(&Blocking, &MemoryStorage::default(), 4096, &options)).unwrap_err();
        assert!(matches!(e, Error::TooLarge { limit: 512, .. }), "{e}");
    }

    /// Fails every write, flush and truncation after a number of them; what was done stays.
    struct Failing {
        inner: MemoryStorage,
        left: std::sync::atomic::AtomicI32,
    }

    impl Failing {
        fn step(&self) -> std::io::Result<()> {
            let left = self.left.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
            if left > 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(libc::EIO)) }
        }
    }

    impl Storage for Failing {
        fn read(&self, pieces: &[crate::storage::IoDst<'_>], offset: u64) -> std::io::Result<usize> {
            self.inner.read(pieces, offset)
        }
        fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> std::io::Result<()> {
            self.step()?;
            self.inner.write(pieces, offset)
        }
        fn flush(&self) -> std::io::Result<()> {
            self.step()
        }
        fn size(&self) -> std::io::Result<u64> {
            self.inner.size()
        }
        fn truncate(&self, size: u64) -> std::io::Result<()> {
            self.step()?;
            self.inner.truncate(size)
        }
    }

    #[test]
    fn no_half_made_image_opens() {
        let mut options = CreateOptions::default();
        options.set("backing_file", "base").unwrap();
        options.set("backing_fmt", "raw").unwrap();
        let (_, whole) = made(1 << 20, &options);
        for steps in 0..20 {
            // There was an image before, which must not come back with the tables of the new one.
            let storage = Failing { inner: MemoryStorage::new(whole.clone()), left: steps.into() };
            let result = block_on(create_with(&Blocking, &storage, 1 << 20, &options));
            let bytes = storage.inner.snapshot();
            match result {
                Ok(()) => return assert!(bytes == whole && steps == 8, "{steps} steps"),
                Err(_) if bytes == whole => {}
                Err(_) => assert!(block_on(load_header(&Blocking, &storage)).is_err(), "opens after {steps} steps"),
            }
        }
        panic!("never done");
    }

    #[test]
    fn version_2_has_no_version_3_fields() {
        let (header, bytes) = made(1 << 20, &CreateOptions { compat: Compat::V2, ..Default::default() });
        assert_eq!((header.geometry.version, header.header_length), (2, 72));
        assert!(bytes[72..0x10000].iter().all(|&b| b == 0));
    }
}
