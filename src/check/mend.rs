//! PURE: which L2 entries can be put right by themselves, and how. Nothing that reads as data reads as anything else
//! afterwards; what would need a guess stays as it is.

use crate::format::l2::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::format::{Geometry, L2Entry};

/// Whether an entry points to a place that is no cluster, and does not need it: all that it says is zeroes or nothing.
pub fn droppable(entry: L2Entry, geometry: Geometry) -> bool {
    let unaligned = entry.descriptor & OFFSET_MASK & (geometry.cluster_size_bytes() - 1) != 0;
    let holds_data = match geometry.extended_l2 {
        true => entry.bitmap as u32 != 0,
        false => entry.descriptor & ZERO == 0 || geometry.version < 3,
    };
    entry.descriptor & COMPRESSED == 0 && unaligned && !holds_data
}

/// The entry with everything put right that depends on nothing but itself.
pub fn mend(entry: L2Entry, geometry: Geometry, data_file: bool) -> L2Entry {
    let L2Entry { mut descriptor, mut bitmap } = entry;
    if descriptor & COMPRESSED != 0 {
        // Both are reserved, and nobody reads them (scenario J6).
        descriptor &= !COPIED;
        bitmap = 0;
    } else if droppable(entry, geometry) {
        descriptor = if geometry.extended_l2 { 0 } else { ZERO };
    } else if descriptor & OFFSET_MASK == 0 && !data_file {
        descriptor &= !COPIED;
    }
    L2Entry { descriptor, bitmap }
}

/// The entry with COPIED as it has to be.
pub fn with_copied(entry: L2Entry, copied: bool) -> L2Entry {
    let descriptor = entry.descriptor & !COPIED | if copied { COPIED } else { 0 };
    L2Entry { descriptor, ..entry }
}

/// Whether COPIED means something in the entry: it refers to a cluster that is not compressed.
pub fn has_cluster(entry: L2Entry, geometry: Geometry, data_file: bool) -> bool {
    let word = entry.descriptor;
    let plain_zero = !geometry.extended_l2 && word & ZERO != 0;
    word & COMPRESSED == 0 && (word & OFFSET_MASK != 0 || data_file && word & COPIED != 0 && !plain_zero)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXT: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
    const STD: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: false, refcount_order: 4 };

    fn mended(geometry: Geometry, descriptor: u64, bitmap: u64) -> (u64, u64) {
        let L2Entry { descriptor, bitmap } = mend(L2Entry { descriptor, bitmap }, geometry, false);
        (descriptor, bitmap)
    }

    /// Scenarios K1 and K2: data at an unaligned offset stays, a preallocated cluster is dropped and its zeroes stay.
    #[test]
    fn only_what_holds_no_data_is_dropped() {
        assert_eq!(mended(EXT, COPIED | 0x50200, 4), (COPIED | 0x50200, 4));
        assert_eq!(mended(EXT, COPIED | 0x50200, 4 << 32), (0, 4 << 32));
        assert_eq!(mended(STD, COPIED | 0x50200, 0), (COPIED | 0x50200, 0));
        assert_eq!(mended(STD, COPIED | 0x50201, 0), (ZERO, 0));
        let v2 = Geometry { version: 2, ..STD };
        assert_eq!(mended(v2, COPIED | 0x50201, 0), (COPIED | 0x50201, 0));
    }

    #[test]
    fn reserved_parts_of_compressed_and_empty_entries_are_cleared() {
        let compressed = COMPRESSED | 2 << 54 | 0x50040b;
        assert_eq!(mended(EXT, COPIED | compressed, 7), (compressed, 0));
        assert_eq!(mended(STD, COPIED, 0), (0, 0));
        assert_eq!(mended(STD, COPIED | ZERO, 0), (ZERO, 0));
        assert_eq!(mended(EXT, COPIED | 0x50000, 1), (COPIED | 0x50000, 1), "sound");
        let raw = mend(L2Entry { descriptor: COPIED, bitmap: 0 }, STD, true);
        assert_eq!(raw.descriptor, COPIED, "offset 0 of a data file");
    }
}
