//! The header: one validation pass from bytes to a value that the rest can use, and back. Spec, "Header".

use super::extension::{self, Extension, FeatureKind};
use super::geometry::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_MIN_EXTENDED, Geometry};
use super::layout::{self, Field, V2_LENGTH, V3_LENGTH_MIN};
use super::snapshot;
use super::units::HostOffset;
use crate::error::{Error, Result};

/// "QFI" and 0xfb.
pub const MAGIC: u32 = 0x5146_49fb;

/// Incompatible bit 0: refcounts may be wrong.
pub const INCOMPATIBLE_DIRTY: u64 = 1;
/// Incompatible bit 1: any structure may be wrong.
pub const INCOMPATIBLE_CORRUPT: u64 = 2;
/// Incompatible bit 2: guest clusters are in an external data file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 4;
/// Incompatible bit 3: compressed clusters are not deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 8;
/// Incompatible bit 4: extended L2 entries.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 16;
/// Compatible bit 0: refcounts may be written late.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
/// Autoclear bit 0: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1;
/// Autoclear bit 1: the external data file is a raw image by itself.
pub const AUTOCLEAR_DATA_FILE_RAW: u64 = 2;
/// Autoclear bits of what this library keeps up to date.
pub const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW;

const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;

/// Offset of size and L1 table together (a resize, or a switch to a snapshot, is one write of one sector).
pub const OFFSET_SIZE: u64 = layout::SIZE.offset as u64;
/// Bytes from there to the end of the snapshot table's offset: all roots, in one sector.
pub const ROOTS_BYTES: usize = V2_LENGTH - layout::SIZE.offset;
/// Offset of l1_size; l1_table_offset follows it.
pub const OFFSET_L1_SIZE: u64 = layout::L1_SIZE.offset as u64;
/// Offset of refcount_table_offset; refcount_table_clusters follows it.
pub const OFFSET_REFCOUNT_TABLE: u64 = layout::REFCOUNT_TABLE_OFFSET.offset as u64;
/// Offset of incompatible_features.
pub const OFFSET_INCOMPATIBLE: u64 = layout::INCOMPATIBLE_FEATURES.offset as u64;
/// Offset of compatible_features.
pub const OFFSET_COMPATIBLE: u64 = layout::COMPATIBLE_FEATURES.offset as u64;
/// Offset of nb_snapshots; snapshots_offset follows it.
pub const OFFSET_SNAPSHOTS: u64 = layout::NB_SNAPSHOTS.offset as u64;
/// Offset of autoclear_features.
pub const OFFSET_AUTOCLEAR: u64 = layout::AUTOCLEAR_FEATURES.offset as u64;

/// Most entries of an L1 table (32 MiB, as QEMU).
pub const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
/// Largest refcount table (as QEMU).
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Largest disk with an external data file: host offsets in tables have 56 bits, and are guest offsets then.
pub const DATA_FILE_BYTES_MAX: u64 = 1 << 56;
/// Longest name of a backing file. Spec, "backing_file_size".
pub const BACKING_NAME_MAX: usize = 1023;
/// Most snapshots (as QEMU).
pub const SNAPSHOTS_MAX: u32 = 65536;
/// What a disk writes as a whole: the part of the header that switches it.
const SECTOR_BYTES: usize = 512;
/// Header length of the version 3 images that this library makes: up to compression_type and its padding.
const V3_LENGTH_NEW: u32 = 112;

/// Method of the compressed clusters of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Raw deflate streams, which QEMU calls zlib.
    #[default]
    Zlib,
    /// zstd.
    Zstd,
}

/// Encryption method of the image's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encryption {
    /// None.
    #[default]
    None,
    /// AES-CBC, obsolete.
    Aes,
    /// LUKS.
    Luks,
}

/// The backing file as the image names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Its name.
    pub name: String,
    /// Its format, where the image declares one.
    pub format: Option<String>,
}

/// A header whose fields have been checked, each by itself and against the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size, kind of L2 entry, refcount width.
    pub geometry: Geometry,
    /// Size of the disk as the guest sees it.
    pub size_bytes: u64,
    /// The backing file.
    pub backing: Option<BackingName>,
    /// Encryption of guest data.
    pub encryption: Encryption,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// The active L1 table.
    pub l1_offset: HostOffset,
    /// The refcount table.
    pub refcount_table_offset: HostOffset,
    /// Its size in clusters.
    pub refcount_table_clusters: u32,
    /// Number of snapshots.
    pub snapshots: u32,
    /// The snapshot table.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Method of compressed clusters.
    pub compression: Compression,
    /// Length of the header before its extensions.
    pub header_length: u32,
    /// What follows compression_type up to `header_length`: padding, and fields that are not known yet.
    pub unknown_fields: Vec<u8>,
    /// The extensions in their order. The backing file's format in here yields to `backing`.
    pub extensions: Vec<Extension>,
}

fn wrong<T>(field: Field, value: u64, expected: &'static str) -> Result<T> {
    Err(Error::Header { field: field.name, value, expected })
}

/// Size of the first cluster as the start of a file declares it, if that is a qcow2 image: at
/// least 72 bytes, the shortest header.
pub fn first_cluster_bytes(start: &[u8]) -> Result<u64> {
    check_magic(start)?;
    if start.len() < V2_LENGTH {
        return truncated(start.len(), "at least 72 bytes, a version 2 header");
    }
    Ok(1 << parse_cluster_bits(start)?)
}

fn truncated<T>(length: usize, expected: &'static str) -> Result<T> {
    Err(Error::Header { field: "file length", value: length as u64, expected })
}

fn check_magic(bytes: &[u8]) -> Result<()> {
    if bytes.len() < layout::MAGIC.bytes {
        return truncated(bytes.len(), "at least 72 bytes, a version 2 header");
    }
    match layout::MAGIC.get(bytes) as u32 {
        MAGIC => Ok(()),
        magic => Err(Error::NotQcow2 { magic }),
    }
}

fn parse_cluster_bits(bytes: &[u8]) -> Result<u32> {
    let bits = layout::CLUSTER_BITS.get(bytes);
    if bits < u64::from(CLUSTER_BITS_MIN) || bits > u64::from(CLUSTER_BITS_MAX) {
        return wrong(layout::CLUSTER_BITS, bits, "9 to 21 (clusters of 512 bytes to 2 MiB)");
    }
    Ok(bits as u32)
}

/// The fields that only version 3 has; for version 2, what the specification says they count as.
struct V3Fields {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_length: u32,
    compression: Compression,
    unknown_fields: Vec<u8>,
}

impl V3Fields {
    const OF_VERSION_2: Self = Self {
        incompatible: 0,
        compatible: 0,
        autoclear: 0,
        refcount_order: 4,
        header_length: V2_LENGTH as u32,
        compression: Compression::Zlib,
        unknown_fields: Vec::new(),
    };

    fn parse(bytes: &[u8], cluster_bits: u32) -> Result<Self> {
        if bytes.len() < V3_LENGTH_MIN {
            return truncated(bytes.len(), "at least 104 bytes, a version 3 header");
        }
        let incompatible = layout::INCOMPATIBLE_FEATURES.get(bytes);
        let order = layout::REFCOUNT_ORDER.get(bytes);
        if order > 6 {
            return wrong(layout::REFCOUNT_ORDER, order, "0 to 6 (refcounts of 1 to 64 bits)");
        }
        let length = layout::HEADER_LENGTH.get(bytes);
        if length < V3_LENGTH_MIN as u64 || !length.is_multiple_of(8) {
            return wrong(layout::HEADER_LENGTH, length, "a multiple of 8, at least 104");
        }
        if length > 1 << cluster_bits {
            return wrong(layout::HEADER_LENGTH, length, "at most the cluster size");
        }
        if length > bytes.len() as u64 {
            return wrong(layout::HEADER_LENGTH, length, "at most the length of the file");
        }
        let rest = &bytes[V3_LENGTH_MIN..length as usize];
        let (compression_type, unknown) = rest.split_first().map_or((0, rest), |(&first, rest)| (first, rest));
        Ok(Self {
            incompatible,
            compatible: layout::COMPATIBLE_FEATURES.get(bytes),
            autoclear: layout::AUTOCLEAR_FEATURES.get(bytes),
            refcount_order: order as u32,
            header_length: length as u32,
            compression: parse_compression(compression_type, incompatible & INCOMPATIBLE_COMPRESSION != 0)?,
            unknown_fields: unknown.to_vec(),
        })
    }
}

fn parse_compression(value: u8, bit: bool) -> Result<Compression> {
    match (value, bit) {
        (0, false) => Ok(Compression::Zlib),
        (0, true) => wrong(layout::COMPRESSION_TYPE, 0, "a type other than 0, as incompatible bit 3 is set"),
        (_, false) => wrong(layout::COMPRESSION_TYPE, value.into(), "0, as incompatible bit 3 is not set"),
        (1, true) => Ok(Compression::Zstd),
        (_, true) => Err(Error::Unsupported { feature: format!("compression type {value}") }),
    }
}

impl Header {
    /// Reads a header from the start of an image: the first cluster, or the whole file if that is shorter.
    ///
    /// Checks every field; what the image needs and where its tables lie is checked by
    /// [`check_supported`](Self::check_supported) and [`check_placement`](Self::check_placement).
    pub fn parse(first_cluster: &[u8]) -> Result<Self> {
        let bytes = first_cluster;
        check_magic(bytes)?;
        if bytes.len() < V2_LENGTH {
            return truncated(bytes.len(), "at least 72 bytes, a version 2 header");
        }
        let version = layout::VERSION.get(bytes);
        if version != 2 && version != 3 {
            return wrong(layout::VERSION, version, "2 or 3");
        }
        let cluster_bits = parse_cluster_bits(bytes)?;
        let v3 = if version == 3 { V3Fields::parse(bytes, cluster_bits)? } else { V3Fields::OF_VERSION_2 };
        let geometry = Geometry {
            version: version as u32,
            cluster_bits,
            extended_l2: v3.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            refcount_order: v3.refcount_order,
        };
        if geometry.extended_l2 && cluster_bits < CLUSTER_BITS_MIN_EXTENDED {
            return wrong(
                layout::CLUSTER_BITS,
                cluster_bits.into(),
                "at least 14, as the image has extended L2 entries",
            );
        }
        let (size_bytes, l1_entries) = parse_size(bytes, geometry)?;
        let end = bytes.len().min(1 << cluster_bits);
        let (backing, extensions) = parse_names(&bytes[..end], v3.header_length as usize)?;
        let header = Self {
            geometry,
            size_bytes,
            backing,
            encryption: parse_encryption(bytes)?,
            l1_entries,
            l1_offset: HostOffset(layout::L1_TABLE_OFFSET.get(bytes)),
            refcount_table_offset: HostOffset(layout::REFCOUNT_TABLE_OFFSET.get(bytes)),
            refcount_table_clusters: parse_refcount_table_clusters(bytes, geometry)?,
            snapshots: parse_snapshots(bytes)?,
            snapshots_offset: HostOffset(layout::SNAPSHOTS_OFFSET.get(bytes)),
            incompatible: v3.incompatible,
            compatible: v3.compatible,
            autoclear: v3.autoclear,
            compression: v3.compression,
            header_length: v3.header_length,
            unknown_fields: v3.unknown_fields,
            extensions,
        };
        header.check_extensions()?;
        Ok(header)
    }

    /// As [`parse`](Self::parse), for a header whose refcount table may have a size that it cannot have: then it
    /// comes back with offset 0, where no table can lie.
    pub fn parse_leniently(mut first_cluster: Vec<u8>) -> Result<Self> {
        match Self::parse(&first_cluster) {
            Err(Error::Header { field, .. }) if field == layout::REFCOUNT_TABLE_CLUSTERS.name => {
                layout::REFCOUNT_TABLE_OFFSET.set(&mut first_cluster, 0);
                layout::REFCOUNT_TABLE_CLUSTERS.set(&mut first_cluster, 1);
                Self::parse(&first_cluster)
            }
            parsed => parsed,
        }
    }

    /// Checks the extensions against the fields that say what they have to be.
    fn check_extensions(&self) -> Result<()> {
        extension::data_file(&self.extensions)?;
        extension::check_encryption(&self.extensions, self.encryption == Encryption::Luks, self.geometry)?;
        if self.autoclear & AUTOCLEAR_BITMAPS != 0 {
            extension::bitmaps(&self.extensions, self.geometry)?;
        }
        if self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0 && self.incompatible & INCOMPATIBLE_DATA_FILE == 0 {
            return wrong(
                layout::AUTOCLEAR_FEATURES,
                self.autoclear,
                "raw external data (bit 1) to be clear, as the image has no external data file (incompatible bit 2)",
            );
        }
        Ok(())
    }

    /// Refuses, by name, what this version does not implement and what nobody knows yet.
    pub fn check_supported(&self) -> Result<()> {
        let refuse = |feature: String| Err(Error::Unsupported { feature });
        self.check_known()?;
        match self.encryption {
            Encryption::None => {}
            Encryption::Aes => return refuse("encryption (AES)".into()),
            Encryption::Luks => return refuse("encryption (LUKS)".into()),
        }
        self.check_data_file()
    }

    /// Refuses what does not go together with an external data file (spec, "incompatible_features", bit 2, and
    /// "autoclear_features", bit 1).
    fn check_data_file(&self) -> Result<()> {
        if !self.has_data_file() {
            return Ok(());
        }
        if self.snapshots > 0 {
            let expected = "0, as the image has an external data file, which goes without internal snapshots";
            return wrong(layout::NB_SNAPSHOTS, self.snapshots.into(), expected);
        }
        if self.data_file_is_raw() && self.backing.is_some() {
            let expected = "raw external data (bit 1) to be clear, as the image has a backing file";
            return wrong(layout::AUTOCLEAR_FEATURES, self.autoclear, expected);
        }
        if self.size_bytes > DATA_FILE_BYTES_MAX {
            let expected =
                "at most 2^56, as the image has an external data file, and its host offsets are guest offsets";
            return wrong(layout::SIZE, self.size_bytes, expected);
        }
        Ok(())
    }

    /// Refuses, by name, what nobody knows yet.
    pub fn check_known(&self) -> Result<()> {
        let unknown = self.incompatible & !INCOMPATIBLE_KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let names: Vec<String> = (0..64).filter(|bit| unknown >> bit & 1 != 0).map(|bit| self.name_of(bit)).collect();
        Err(Error::Unsupported { feature: names.join(", ") })
    }

    /// Checks that the L1 table lies where one can lie. See [`check_placement`](Self::check_placement).
    pub fn check_l1_placement(&self, file_size: u64) -> Result<()> {
        let (cluster, at, bytes) =
            (self.geometry.cluster_size_bytes(), self.l1_offset.0, u64::from(self.l1_entries) * 8);
        let end = file_size.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        if bytes > 0 && (at == 0 || !at.is_multiple_of(cluster)) {
            return wrong(layout::L1_TABLE_OFFSET, at, "a multiple of the cluster size, and not 0");
        }
        if bytes > 0 && at.checked_add(bytes).is_none_or(|table_end| table_end > end) {
            return wrong(layout::L1_TABLE_OFFSET, at, "an offset at which the whole table lies inside the file");
        }
        Ok(())
    }

    /// Whether guest data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether that file is a raw image of the disk by itself.
    pub fn data_file_is_raw(&self) -> bool {
        self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// The name of the external data file, if the image stores one. (A malformed one was refused with the header.)
    pub fn data_file_name(&self) -> Option<String> {
        extension::data_file(&self.extensions).unwrap_or_default()
    }

    fn name_of(&self, bit: u32) -> String {
        match extension::feature_name(&self.extensions, FeatureKind::Incompatible, bit) {
            Some(name) => format!("'{name}' (incompatible feature bit {bit})"),
            None => format!("unknown incompatible feature bit {bit}"),
        }
    }

    /// Checks where the tables lie: aligned, inside the file, apart from the header and from each other.
    pub fn check_placement(&self, file_size: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size_bytes();
        let l1_bytes = u64::from(self.l1_entries) * 8;
        let refcount_bytes = u64::from(self.refcount_table_clusters) * cluster;
        let snapshot_bytes = u64::from(self.snapshots) * snapshot::ENTRY_BYTES_MIN as u64;
        // The last cluster of a file need not be complete: what is missing of it reads as zeroes.
        let file_end = file_size.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        let tables = [
            (layout::REFCOUNT_TABLE_OFFSET, self.refcount_table_offset.0, refcount_bytes, file_end),
            (layout::L1_TABLE_OFFSET, self.l1_offset.0, l1_bytes, file_size),
            (layout::SNAPSHOTS_OFFSET, self.snapshots_offset.0, snapshot_bytes, file_size),
        ];
        for (i, &(field, offset, bytes, limit)) in tables.iter().enumerate() {
            if bytes == 0 {
                continue;
            }
            if offset % cluster != 0 {
                return wrong(field, offset, "a multiple of the cluster size");
            }
            if offset == 0 {
                return wrong(field, offset, "an offset after the header, which occupies the first cluster");
            }
            if offset.checked_add(bytes).is_none_or(|end| end > limit) {
                return wrong(field, offset, "an offset at which the whole table lies inside the file");
            }
            for &(_, other, other_bytes, _) in &tables[..i] {
                // Whole clusters: one cluster has one role.
                let (end, other_end) = (offset + bytes, other + other_bytes.next_multiple_of(cluster));
                if other_bytes > 0 && offset < other_end && other < end {
                    return wrong(field, offset, "an offset at which the table does not overlap another table");
                }
            }
        }
        Ok(())
    }

    /// The bytes from [`OFFSET_SIZE`] on that say where everything is: size, L1 table, refcount table, snapshot table.
    pub fn encode_roots(&self) -> [u8; ROOTS_BYTES] {
        let mut bytes = vec![0; self.header_length as usize];
        self.encode_fields(&mut bytes);
        std::array::from_fn(|i| bytes[OFFSET_SIZE as usize + i])
    }

    /// Writes the header, its extensions and the backing file name. The result is at most one cluster long; what
    /// follows it in the first cluster has to be zero.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = self.encode_area()?;
        if let Some(backing) = &self.backing {
            let offset = bytes.len() as u64;
            layout::BACKING_FILE_OFFSET.set(&mut bytes, offset);
            layout::BACKING_FILE_SIZE.set(&mut bytes, backing.name.len() as u64);
            bytes.extend_from_slice(backing.name.as_bytes());
        }
        let limit = self.geometry.cluster_size_bytes();
        if bytes.len() as u64 > limit {
            return Err(Error::TooLarge { what: "header with extensions and backing file name", limit });
        }
        Ok(bytes)
    }

    /// The extensions as they are to be stored: the format of the backing file is that of `backing`.
    fn stored_extensions(&self) -> Vec<Extension> {
        let mut list = self.extensions.clone();
        let Some(backing) = &self.backing else { return list };
        let Some(format) = &backing.format else {
            list.retain(|e| e.kind != extension::BACKING_FORMAT);
            return list;
        };
        match list.iter_mut().find(|e| e.kind == extension::BACKING_FORMAT) {
            Some(stored) => stored.data = format.as_bytes().to_vec(),
            None => list.insert(0, Extension { kind: extension::BACKING_FORMAT, data: format.as_bytes().to_vec() }),
        }
        list
    }

    /// The fields and the extensions; without the backing file name, and where it is.
    fn encode_area(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.header_length as usize];
        self.encode_fields(&mut bytes);
        for e in &self.stored_extensions() {
            extension::encode_one(e.kind, &e.data, &mut bytes)?;
        }
        extension::encode_end(&mut bytes);
        Ok(bytes)
    }

    /// Sets the data of the extension of that type, or takes it out. Types that are not known may be there several
    /// times: all of them become this one.
    pub fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        let at = self.extensions.iter().position(|e| e.kind == kind);
        self.extensions.retain(|e| e.kind != kind);
        if let Some(data) = data {
            self.extensions.insert(at.unwrap_or(0), Extension { kind, data });
        }
    }

    fn encode_fields(&self, bytes: &mut [u8]) {
        let mut put = |field: Field, value: u64| field.set(bytes, value);
        put(layout::MAGIC, MAGIC.into());
        put(layout::VERSION, self.geometry.version.into());
        put(layout::CLUSTER_BITS, self.geometry.cluster_bits.into());
        put(layout::SIZE, self.size_bytes);
        put(layout::CRYPT_METHOD, self.encryption as u64);
        put(layout::L1_SIZE, self.l1_entries.into());
        put(layout::L1_TABLE_OFFSET, self.l1_offset.0);
        put(layout::REFCOUNT_TABLE_OFFSET, self.refcount_table_offset.0);
        put(layout::REFCOUNT_TABLE_CLUSTERS, self.refcount_table_clusters.into());
        put(layout::NB_SNAPSHOTS, self.snapshots.into());
        put(layout::SNAPSHOTS_OFFSET, self.snapshots_offset.0);
        if self.geometry.version < 3 {
            return;
        }
        put(layout::INCOMPATIBLE_FEATURES, self.incompatible);
        put(layout::COMPATIBLE_FEATURES, self.compatible);
        put(layout::AUTOCLEAR_FEATURES, self.autoclear);
        put(layout::REFCOUNT_ORDER, self.geometry.refcount_order.into());
        put(layout::HEADER_LENGTH, self.header_length.into());
        let after = layout::COMPRESSION_TYPE.offset + layout::COMPRESSION_TYPE.bytes;
        if bytes.len() >= after {
            layout::COMPRESSION_TYPE.set(bytes, self.compression as u64);
            bytes[after..][..self.unknown_fields.len()].copy_from_slice(&self.unknown_fields);
        }
    }

    /// The length that new headers of a version have, and the bytes after compression_type in it.
    pub(crate) fn new_length(version: u32) -> (u32, Vec<u8>) {
        if version < 3 {
            return (V2_LENGTH as u32, Vec::new());
        }
        (
            V3_LENGTH_NEW,
            vec![0; V3_LENGTH_NEW as usize - layout::COMPRESSION_TYPE.offset - layout::COMPRESSION_TYPE.bytes],
        )
    }
}

fn parse_encryption(bytes: &[u8]) -> Result<Encryption> {
    match layout::CRYPT_METHOD.get(bytes) {
        0 => Ok(Encryption::None),
        1 => Ok(Encryption::Aes),
        2 => Ok(Encryption::Luks),
        other => wrong(layout::CRYPT_METHOD, other, "0 (none), 1 (AES) or 2 (LUKS)"),
    }
}

fn parse_size(bytes: &[u8], geometry: Geometry) -> Result<(u64, u32)> {
    let size = layout::SIZE.get(bytes);
    let needed = geometry.l1_entries_for(size);
    if needed > L1_ENTRIES_MAX {
        return wrong(layout::SIZE, size, "a size that an L1 table of 32 MiB can map at this cluster size");
    }
    let entries = layout::L1_SIZE.get(bytes);
    if entries > L1_ENTRIES_MAX {
        return wrong(layout::L1_SIZE, entries, "at most 4194304 (an L1 table of 32 MiB)");
    }
    if entries < needed {
        return wrong(layout::L1_SIZE, entries, "enough entries to map the size of the disk");
    }
    Ok((size, entries as u32))
}

fn parse_refcount_table_clusters(bytes: &[u8], geometry: Geometry) -> Result<u32> {
    let clusters = layout::REFCOUNT_TABLE_CLUSTERS.get(bytes);
    if clusters == 0 {
        return wrong(layout::REFCOUNT_TABLE_CLUSTERS, clusters, "at least 1");
    }
    if clusters > REFCOUNT_TABLE_BYTES_MAX >> geometry.cluster_bits {
        return wrong(layout::REFCOUNT_TABLE_CLUSTERS, clusters, "a refcount table of at most 8 MiB");
    }
    Ok(clusters as u32)
}

fn parse_snapshots(bytes: &[u8]) -> Result<u32> {
    let snapshots = layout::NB_SNAPSHOTS.get(bytes);
    if snapshots > u64::from(SNAPSHOTS_MAX) {
        return wrong(layout::NB_SNAPSHOTS, snapshots, "at most 65536");
    }
    Ok(snapshots as u32)
}

/// Whether the start of a first cluster holds everything that [`Header::parse`] looks at. No is always right.
pub fn holds_header(start: &[u8]) -> bool {
    if start.len() < V3_LENGTH_MIN {
        return false;
    }
    let backing = layout::BACKING_FILE_OFFSET.get(start);
    if backing != 0 {
        let end = backing.checked_add(layout::BACKING_FILE_SIZE.get(start));
        return end.is_some_and(|end| end <= start.len() as u64);
    }
    let length = if layout::VERSION.get(start) == 2 { V2_LENGTH as u64 } else { layout::HEADER_LENGTH.get(start) };
    extension::ends_inside(start, length)
}

/// The extensions, and the backing file name that they reach up to.
fn parse_names(cluster: &[u8], header_length: usize) -> Result<(Option<BackingName>, Vec<Extension>)> {
    let offset = layout::BACKING_FILE_OFFSET.get(cluster);
    if offset == 0 {
        let extensions = extension::parse_all(cluster, header_length, cluster.len())?;
        extension::backing_format(&extensions)?;
        return Ok((None, extensions));
    }
    let length = layout::BACKING_FILE_SIZE.get(cluster);
    if offset < header_length as u64 {
        return wrong(layout::BACKING_FILE_OFFSET, offset, "an offset after the header fields");
    }
    if length == 0 || length > BACKING_NAME_MAX as u64 {
        return wrong(layout::BACKING_FILE_SIZE, length, "1 to 1023 bytes");
    }
    if offset.checked_add(length).is_none_or(|end| end > cluster.len() as u64) {
        return wrong(layout::BACKING_FILE_OFFSET, offset, "a name that ends inside the first cluster and the file");
    }
    let (start, end) = (offset as usize, (offset + length) as usize);
    let extensions = extension::parse_all(cluster, header_length, start)?;
    let name = extension::text(&cluster[start..end], "backing file name")?;
    let format = extension::backing_format(&extensions)?;
    Ok((Some(BackingName { name, format }), extensions))
}

mod rewrite;
#[cfg(test)]
mod tests;

pub use rewrite::Rewrite;
