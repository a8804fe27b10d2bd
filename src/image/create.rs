//! Making a new image.
//!
//! Where everything goes is decided in `plan::new_image`. Everything but the first sector is written and made durable
//! before that sector is: a crash leaves no file that opens as half an image.

use std::path::{Path, PathBuf};

use super::allocate::{allocate, write_zeroes};
use super::data_file;
use super::options::{CreateOptions, Preallocation};
use super::progress::{Progress, ProgressFn};
use crate::error::{Error, IoOp, Result};
use crate::format::header::{
    COMPATIBLE_LAZY_REFCOUNTS, DATA_FILE_BYTES_MAX, Encryption, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_EXTENDED_L2,
    L1_ENTRIES_MAX,
};
use crate::format::{BackingName, Compression, Geometry, Header, HostOffset, extension};
use crate::plan::new_image::NewImage;
use crate::storage::file::FileStorage;
use crate::storage::lock::LockMode;
use crate::storage::{Blocking, Io, IoSrc, Storage, hints};
use crate::tables::refcounts::TABLE_BYTES_MAX;
use crate::wait::block_on;

/// The part of the header that is written last, and as a whole.
const SECTOR_BYTES: usize = 512;
/// The size of a disk is rounded up to this, as `qemu-img` does: others count disks in sectors.
const SIZE_UNIT_BYTES: u64 = 512;
/// Clusters from which on QEMU stores the feature name table; smaller ones are left to the backing file name.
const FEATURE_NAMES_CLUSTER_BYTES_MIN: u64 = 8192;

/// Bytes of tables that are written at once.
const BATCH_BYTES: u64 = 1 << 20;
/// Host offsets in tables have 56 bits.
const FILE_BYTES_MAX: u64 = 1 << 56;

/// A new image before anything of it is written: all that can be wrong with the request is known by now.
struct Plan {
    geometry: Geometry,
    layout: NewImage,
    preallocation: Preallocation,
    header: Vec<u8>,
    size_bytes: u64,
}

impl Plan {
    fn new(size_bytes: u64, options: &CreateOptions, is_external: bool) -> Result<Self> {
        let geometry = options.geometry()?;
        data_file::check_new(options, is_external)?;
        let size_bytes = round_size(size_bytes, geometry)?;
        if is_external && size_bytes > DATA_FILE_BYTES_MAX {
            let what = "size of a disk with an external data file";
            return Err(Error::TooLarge { what, limit: DATA_FILE_BYTES_MAX });
        }
        let preallocated = options.preallocation != Preallocation::Off;
        let layout = match is_external {
            false => NewImage::new(geometry, size_bytes, preallocated),
            true => NewImage::with_external_data(geometry, size_bytes, preallocated),
        };
        let cluster = geometry.cluster_size_bytes();
        if layout.refcount_table_clusters * cluster > TABLE_BYTES_MAX {
            return Err(Error::TooLarge { what: "the refcount table", limit: TABLE_BYTES_MAX });
        }
        if layout.total() > FILE_BYTES_MAX / cluster {
            return Err(Error::TooLarge { what: "the image file", limit: FILE_BYTES_MAX });
        }
        let mut header = header(size_bytes, geometry, layout, options);
        if is_external {
            data_file::describe(&mut header, options);
        }
        Ok(Self { geometry, layout, preallocation: options.preallocation, header: header.encode()?, size_bytes })
    }

    fn in_bytes(&self, clusters: u64) -> u64 {
        clusters * self.geometry.cluster_size_bytes()
    }
}

/// A size of a disk as images have them, or why none has this one.
pub(super) fn round_size(size_bytes: u64, geometry: Geometry) -> Result<u64> {
    // A power of two times the largest L1 table: at most 2^61, so that the rounding cannot overflow.
    let limit = L1_ENTRIES_MAX * geometry.l2_table_covers_bytes();
    if size_bytes > limit {
        return Err(Error::TooLarge { what: "size of a disk with this cluster size", limit });
    }
    Ok(size_bytes.next_multiple_of(SIZE_UNIT_BYTES))
}

fn header(size_bytes: u64, geometry: Geometry, layout: NewImage, options: &CreateOptions) -> Header {
    let l1_entries = geometry.l1_entries_for(size_bytes);
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

/// Makes an image in a storage, of which nothing remains. See [`create_with_reporting`].
pub async fn create_with<I: Io>(io: &I, storage: &dyn Storage, size_bytes: u64, options: &CreateOptions) -> Result<()> {
    create_with_reporting(io, storage, size_bytes, options, None).await
}

/// Makes an image in a storage, of which nothing remains. `tell` is told how far it has come.
///
/// The size is rounded up to a multiple of 512 bytes. The backing file is not opened.
pub async fn create_with_reporting<I: Io>(
    io: &I,
    storage: &dyn Storage,
    size_bytes: u64,
    options: &CreateOptions,
    tell: Option<ProgressFn<'_>>,
) -> Result<()> {
    create_with_data_file(io, storage, None, size_bytes, options, tell).await
}

/// As [`create_with_reporting`], with guest data in the storage `data`, of which nothing remains either.
pub async fn create_with_data_file<I: Io>(
    io: &I,
    storage: &dyn Storage,
    data: Option<&dyn Storage>,
    size_bytes: u64,
    options: &CreateOptions,
    tell: Option<ProgressFn<'_>>,
) -> Result<()> {
    let plan = Plan::new(size_bytes, options, data.is_some())?;
    let is_same = |data: &dyn Storage| {
        std::ptr::addr_eq(data, storage) || data.identity().is_some_and(|identity| storage.identity() == Some(identity))
    };
    if data.is_some_and(is_same) {
        return Err(Error::DataFileShared { name: options.data_file.clone().unwrap_or_default() });
    }
    write_image(io, storage, data, &plan, tell).await
}

async fn write_image<I: Io>(
    io: &I,
    storage: &dyn Storage,
    external: Option<&dyn Storage>,
    plan: &Plan,
    tell: Option<ProgressFn<'_>>,
) -> Result<()> {
    let truncate = |size| storage.truncate(size).map_err(|e| Error::io(IoOp::Truncate, size, &e));
    let (tables_end, end) = (plan.in_bytes(plan.layout.data_at()), plan.in_bytes(plan.layout.total()));
    let (data_file, data) = match external {
        Some(external) => (external, 0..plan.size_bytes),
        None => (storage, tables_end..end),
    };
    let has_space = matches!(plan.preallocation, Preallocation::Falloc | Preallocation::Full);
    let data_bytes = if has_space { data.end - data.start } else { 0 };
    let progress = Progress::new(tell, tables_end - plan.in_bytes(1) + data_bytes);
    progress.advance(0)?;
    // Old contents first: what follows the header, and preallocated data, rely on zeroes. The empty file is made
    // durable, so that no old header can meet new tables.
    truncate(0)?;
    flush(io, storage).await?;
    truncate(end)?;
    write_tables(io, storage, plan, &progress).await?;
    if let Some(external) = external {
        for size in [0, plan.size_bytes] {
            external.truncate(size).map_err(|e| Error::io(IoOp::Truncate, size, &e))?;
        }
    }
    match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata => {}
        Preallocation::Falloc => allocate(io, data_file, data.start, data_bytes, &progress).await?,
        Preallocation::Full => write_zeroes(io, data_file, data.start, data_bytes, &progress).await?,
    }
    if let Some(external) = external {
        flush(io, external).await?;
    }
    let (first, rest) = plan.header.split_at(plan.header.len().min(SECTOR_BYTES));
    if !rest.is_empty() {
        write(io, storage, rest, SECTOR_BYTES as u64).await?;
    }
    flush(io, storage).await?;
    write(io, storage, first, 0).await?;
    flush(io, storage).await
}

/// Writes all tables, in full: a table that is filled later needs no more space than the new image has.
async fn write_tables<I: Io>(io: &I, storage: &dyn Storage, plan: &Plan, progress: &Progress<'_>) -> Result<()> {
    let batch = BATCH_BYTES.max(plan.in_bytes(1));
    let clusters_per_batch = batch / plan.in_bytes(1);
    let mut bytes = vec![0; batch as usize];
    let (mut first, end) = (1, plan.layout.data_at());
    while first < end {
        let count = clusters_per_batch.min(end - first);
        let part = &mut bytes[..plan.in_bytes(count) as usize];
        part.fill(0);
        for (cluster, place) in (first..).zip(part.chunks_exact_mut(plan.in_bytes(1) as usize)) {
            plan.layout.fill(cluster, place);
        }
        write(io, storage, part, plan.in_bytes(first)).await?;
        progress.advance(plan.in_bytes(count))?;
        first += count;
    }
    Ok(())
}

async fn write<I: Io>(io: &I, storage: &dyn Storage, bytes: &[u8], offset: u64) -> Result<()> {
    io.write(storage, &[IoSrc::from(bytes)], offset).await.map_err(|e| Error::io(IoOp::Write, offset, &e))
}

async fn flush<I: Io>(io: &I, storage: &dyn Storage) -> Result<()> {
    io.flush(storage).await.map_err(|e| Error::io(IoOp::Flush, 0, &e))
}

/// Makes an image in a file. See [`create_reporting`].
pub fn create(path: &Path, size_bytes: u64, options: &CreateOptions, overwrite: bool) -> Result<()> {
    create_reporting(path, size_bytes, options, overwrite, None)
}

/// Makes an image in a file. A file that exists is refused, or replaced with `overwrite`; nothing is touched if the
/// options cannot be had, and a file that was made here is removed again if it cannot be completed. `tell` is told how
/// far it has come.
pub fn create_reporting(
    path: &Path,
    size_bytes: u64,
    options: &CreateOptions,
    overwrite: bool,
    tell: Option<ProgressFn<'_>>,
) -> Result<()> {
    let plan = Plan::new(size_bytes, options, options.data_file.is_some())?;
    let file = NewFile::open(path, overwrite)?;
    let data = data_file::path_for_new(path, options).map(|path| NewFile::open(&path, overwrite)).transpose()?;
    if let Some(data) = &data
        && data.storage.identity() == file.storage.identity()
    {
        return Err(Error::DataFileShared { name: data.path.display().to_string() });
    }
    for new in data.iter().chain([&file]).filter(|new| new.goes_away) {
        give_hints(&new.storage, options);
    }
    let external = data.as_ref().map(|data| &data.storage as &dyn Storage);
    block_on(write_image(&Blocking, &file.storage, external, &plan, tell))?;
    data.into_iter().chain([file]).for_each(NewFile::keep);
    Ok(())
}

/// Tells the file system what it is asked to do with a file that was made just now.
fn give_hints(storage: &FileStorage, options: &CreateOptions) {
    if options.nocow {
        hints::no_copy_on_write(storage.fd());
    }
    if options.extent_size_hint_bytes > 0 {
        hints::extent_size(storage.fd(), options.extent_size_hint_bytes);
    }
}

/// A file that is being written to as a whole. If it was made here and is not completed, it goes away again.
struct NewFile {
    path: PathBuf,
    storage: FileStorage,
    goes_away: bool,
}

impl NewFile {
    fn open(path: &Path, overwrite: bool) -> Result<Self> {
        let (file, made_here) = open_file(path, overwrite)?;
        let new = Self { path: path.to_path_buf(), storage: FileStorage::new(file), goes_away: made_here };
        // Not being able to lock is no reason to fail; that somebody uses the file is. The lock goes with the file.
        if matches!(new.storage.lock(LockMode::Writer), Ok(false)) {
            return Err(Error::Locked { name: path.display().to_string() });
        }
        Ok(new)
    }

    fn keep(mut self) {
        self.goes_away = false;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.goes_away {
            // The error of the creation is what the caller has to know; if this fails too, an empty file is left.
            let _ = std::fs::remove_file(&self.path);
        }
    }
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
        let layout = NewImage::new(header.geometry, 128 << 30, false);
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
