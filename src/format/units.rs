//! Offsets, indices and counts of the format as types of their own, with only the arithmetic that means something.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(0x{:x})"), self.0)
            }
        }
    };
}

unit!(
    /// Byte offset as the guest sees it.
    GuestOffset
);
unit!(
    /// Byte offset into an image file.
    HostOffset
);
unit!(
    /// Index of a guest cluster: guest offset / cluster size.
    GuestCluster
);
unit!(
    /// Index of a host cluster: host offset / cluster size.
    HostCluster
);
unit!(
    /// Index into the L1 table.
    L1Index
);
unit!(
    /// Index of an L2 slice, counted over all L2 tables: the unit of the L2 cache.
    SliceIndex
);

impl GuestOffset {
    /// The offset `bytes` further on.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl HostOffset {
    /// The offset `bytes` further on.
    pub fn plus(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

impl HostCluster {
    /// The cluster `n` further on.
    pub fn plus(self, n: u64) -> Self {
        Self(self.0 + n)
    }
}

/// The words of a table as they are stored: 64 bits each, big-endian. Spec, "General".
pub fn words(table: &[u8]) -> impl ExactSizeIterator<Item = u64> {
    table.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}
