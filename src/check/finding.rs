//! What a check finds: one value for each thing that is wrong, with its place.

use std::fmt;

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum FindingKind {
    /// Clusters are counted more often than they are referred to. Space is lost, nothing else.
    Leak,
    /// Clusters are referred to more often than they are counted: they could be handed out again while in use.
    CountTooLow,
    /// More references than a count of this width can tell.
    CountOverflow,
    /// A COPIED flag does not say whether the count is one.
    CopiedFlag,
    /// A reference reaches past the end of the file.
    OutsideFile,
    /// A reference is not a multiple of the cluster size.
    Unaligned,
    /// Bits are set that are reserved.
    ReservedBits,
    /// Flags or bitmap of an L2 entry contradict each other.
    MalformedEntry,
    /// A refcount block cannot be used: it lies where it cannot, or something else lies there too.
    RefcountBlock,
    /// The refcount table itself cannot be used.
    RefcountTable,
    /// Something else refers to a cluster that holds metadata.
    Overlap,
    /// The snapshot table or one of its entries is malformed.
    SnapshotTable,
    /// The bitmap directory or one of the bitmap tables is malformed.
    Bitmaps,
    /// Something could not be read, and is not checked.
    Unreadable,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What kind of thing.
    pub kind: FindingKind,
    /// Which structure is meant, in a few words.
    pub what: &'static str,
    /// Where in the image file: the entry that is wrong, or the cluster whose count is.
    pub host_offset: u64,
    /// The guest offset that goes with it, if there is one.
    pub guest_offset: Option<u64>,
    /// The value found there: an entry, a count.
    pub value: u64,
    /// Of counts: how many references there are. Of others: 0.
    pub references: u64,
    /// Of counts: how many clusters in a row this is true of. Of others: how often the structure is referred to.
    pub clusters: u64,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, value) = (self.host_offset, self.value);
        match self.kind {
            FindingKind::Leak | FindingKind::CountTooLow | FindingKind::CountOverflow => {
                let verb = if self.kind == FindingKind::Leak { "leaked" } else { "counted too low" };
                let n = self.clusters;
                write!(f, "{n} cluster(s) from host offset 0x{at:x} {verb}: ")?;
                write!(f, "refcount {value}, {} reference(s)", self.references)
            }
            FindingKind::CopiedFlag => {
                write!(f, "COPIED flag of {} is wrong: 0x{value:x} at host offset 0x{at:x}", self.what)
            }
            FindingKind::Overlap => {
                write!(f, "cluster at host offset 0x{at:x} holds metadata, and something else lies there too")
            }
            FindingKind::OutsideFile => {
                write!(f, "{} reaches past the end of the file: 0x{value:x} at host offset 0x{at:x}", self.what)
            }
            FindingKind::Unaligned => {
                write!(f, "{} is not aligned to a cluster: 0x{value:x} at host offset 0x{at:x}", self.what)
            }
            FindingKind::ReservedBits => {
                write!(f, "{} has reserved bits set: 0x{value:x} at host offset 0x{at:x}", self.what)
            }
            _ => write!(f, "{}: 0x{value:x} at host offset 0x{at:x}", self.what),
        }?;
        match self.guest_offset {
            Some(guest) => write!(f, " (guest offset 0x{guest:x})"),
            None => Ok(()),
        }
    }
}
