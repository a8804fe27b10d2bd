//! Where each header field lies. Spec, "Header". Declared once; that the fields tile the header without a gap is
//! checked when this file is compiled.

/// One field of the header (or of another structure): its name in the specification, its offset and its width in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Name in the specification.
    pub name: &'static str,
    /// Offset from the start of the file (or of the structure).
    pub offset: usize,
    /// Width in bytes: 1 to 8.
    pub bytes: usize,
}

pub(super) const fn at(offset: usize, bytes: usize, name: &'static str) -> Field {
    Field { name, offset, bytes }
}

/// Length of a version 2 header.
pub const V2_LENGTH: usize = 72;
/// Shortest version 3 header.
pub const V3_LENGTH_MIN: usize = 104;

pub(super) const MAGIC: Field = at(0, 4, "magic");
pub(super) const VERSION: Field = at(4, 4, "version");
pub(super) const BACKING_FILE_OFFSET: Field = at(8, 8, "backing_file_offset");
pub(super) const BACKING_FILE_SIZE: Field = at(16, 4, "backing_file_size");
pub(super) const CLUSTER_BITS: Field = at(20, 4, "cluster_bits");
pub(super) const SIZE: Field = at(24, 8, "size");
pub(super) const CRYPT_METHOD: Field = at(32, 4, "crypt_method");
pub(super) const L1_SIZE: Field = at(36, 4, "l1_size");
pub(super) const L1_TABLE_OFFSET: Field = at(40, 8, "l1_table_offset");
pub(super) const REFCOUNT_TABLE_OFFSET: Field = at(48, 8, "refcount_table_offset");
pub(super) const REFCOUNT_TABLE_CLUSTERS: Field = at(56, 4, "refcount_table_clusters");
pub(super) const NB_SNAPSHOTS: Field = at(60, 4, "nb_snapshots");
pub(super) const SNAPSHOTS_OFFSET: Field = at(64, 8, "snapshots_offset");
// Version 3 from here on.
pub(super) const INCOMPATIBLE_FEATURES: Field = at(72, 8, "incompatible_features");
pub(super) const COMPATIBLE_FEATURES: Field = at(80, 8, "compatible_features");
pub(super) const AUTOCLEAR_FEATURES: Field = at(88, 8, "autoclear_features");
pub(super) const REFCOUNT_ORDER: Field = at(96, 4, "refcount_order");
pub(super) const HEADER_LENGTH: Field = at(100, 4, "header_length");
// Additional fields: only there if header_length reaches past them.
pub(super) const COMPRESSION_TYPE: Field = at(104, 1, "compression_type");

/// All fields, in their order on disk.
pub const FIELDS: [Field; 19] = [
    MAGIC,
    VERSION,
    BACKING_FILE_OFFSET,
    BACKING_FILE_SIZE,
    CLUSTER_BITS,
    SIZE,
    CRYPT_METHOD,
    L1_SIZE,
    L1_TABLE_OFFSET,
    REFCOUNT_TABLE_OFFSET,
    REFCOUNT_TABLE_CLUSTERS,
    NB_SNAPSHOTS,
    SNAPSHOTS_OFFSET,
    INCOMPATIBLE_FEATURES,
    COMPATIBLE_FEATURES,
    AUTOCLEAR_FEATURES,
    REFCOUNT_ORDER,
    HEADER_LENGTH,
    COMPRESSION_TYPE,
];

const _: () = {
    let (mut i, mut end) = (0, 0);
    while i < FIELDS.len() {
        assert!(FIELDS[i].offset == end, "a header field leaves a gap or overlaps");
        end += FIELDS[i].bytes;
        i += 1;
    }
    assert!(SNAPSHOTS_OFFSET.offset + SNAPSHOTS_OFFSET.bytes == V2_LENGTH);
    assert!(HEADER_LENGTH.offset + HEADER_LENGTH.bytes == V3_LENGTH_MIN);
};

impl Field {
    /// Reads the field from its structure, which must be long enough.
    pub fn get(self, header: &[u8]) -> u64 {
        let mut word = [0; 8];
        word[8 - self.bytes..].copy_from_slice(&header[self.offset..][..self.bytes]);
        u64::from_be_bytes(word)
    }

    /// Writes the field into its structure, which must be long enough. The value must fit.
    pub fn set(self, header: &mut [u8], value: u64) {
        debug_assert!(self.bytes == 8 || value >> (8 * self.bytes) == 0, "{} does not fit", self.name);
        header[self.offset..][..self.bytes].copy_from_slice(&value.to_be_bytes()[8 - self.bytes..]);
    }
}
