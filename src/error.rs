//! One typed error for the whole crate. A leaf: it knows no other module.
//!
//! Every variant carries the value that was wrong, so that the text (its [`Display`](std::fmt::Display)) can name it
//! and say what to do; [`Error::code`] is the stable number of the C ABI, [`Error::errno`] what C calls return.

use std::fmt;

/// Result of every fallible call of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What a storage call was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOp {
    /// Opening a file.
    Open,
    /// Reading from a file.
    Read,
    /// Writing to a file.
    Write,
    /// Making a file durable (fdatasync).
    Flush,
    /// Asking for the size of a file.
    Size,
    /// Setting the size of a file.
    Truncate,
    /// Allocating space in a file.
    Allocate,
}

/// What is wrong inside an image, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corruption {
    /// What was found.
    pub kind: CorruptionKind,
    /// Offset into the image file of the structure that is wrong (the entry, not what it points to).
    pub host_offset: u64,
    /// Guest offset that the structure describes, where there is one.
    pub guest_offset: Option<u64>,
    /// The value that was found there.
    pub value: u64,
}

/// A structure of the image that is not guest data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Structure {
    /// The header.
    Header,
    /// The active L1 table.
    L1Table,
    /// An L2 table of the active state.
    L2Table,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The L1 table of a snapshot.
    InactiveL1Table,
    /// An L2 table of a snapshot.
    InactiveL2Table,
    /// The bitmap directory, or a bitmap table.
    Bitmaps,
}

impl Structure {
    /// Its name, for error texts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Header => "the header",
            Self::L1Table => "the L1 table",
            Self::L2Table => "an L2 table",
            Self::RefcountTable => "the refcount table",
            Self::RefcountBlock => "a refcount block",
            Self::SnapshotTable => "the snapshot table",
            Self::InactiveL1Table => "the L1 table of a snapshot",
            Self::InactiveL2Table => "an L2 table of a snapshot",
            Self::Bitmaps => "the bitmap directory or a bitmap table",
        }
    }
}

/// The kinds of corruption that the engine can meet after the header has been accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CorruptionKind {
    /// An L1 entry has reserved bits set.
    L1EntryReservedBits,
    /// An L1 entry points to an offset that is not a multiple of the cluster size.
    L2TableUnaligned,
    /// An L1 entry points past the end of the file.
    L2TableBeyondEof,
    /// An L1 entry points to a cluster that the header, the L1, refcount or snapshot table occupies.
    L2TableInMetadata,
    /// An L2 entry has reserved bits set.
    L2EntryReservedBits,
    /// The host offset in an L2 entry is not a multiple of the cluster size.
    ClusterUnaligned,
    /// An L2 entry says COPIED without a host cluster.
    CopiedWithoutCluster,
    /// A write to a cluster that the header, the L1, refcount or snapshot table occupies.
    ClusterInMetadata(Structure),
    /// The zero flag is set in a version 2 image.
    ZeroFlagInV2,
    /// A compressed cluster is marked COPIED.
    CompressedCopied,
    /// A subcluster is marked both allocated and reading as zeroes.
    SubclusterAllocAndZero,
    /// A subcluster is marked allocated, and the entry has no host cluster.
    SubclusterWithoutCluster,
    /// The bytes of a compressed cluster do not decompress to exactly one cluster.
    CompressedData,
    /// A compressed cluster lies past the end of the file.
    CompressedBeyondEof,
    /// A cluster is compressed although the image has an external data file.
    CompressedInDataFile,
    /// The host offset in an L2 entry is not the guest offset, although the image has an external data file.
    NotAtGuestOffset,
    /// A refcount table entry has reserved bits set or is not a multiple of the cluster size.
    RefcountTableEntry,
    /// A refcount block lies past the end of the file.
    RefcountBlockBeyondEof,
    /// A refcount would fall below zero: the cluster is referenced more often than it is counted.
    RefcountUnderflow,
    /// A cluster that an entry refers to is counted as free.
    ReferencedCountedFree,
    /// The allocator found a cluster counted as free that the header, the L1 table or the refcount structures occupy.
    MetadataCountedFree,
    /// A cluster is to be written to as if it were free, and this structure occupies it.
    StructureCountedFree(Structure),
    /// An L2 table is to be changed in a cluster that this structure occupies.
    TableInStructure(Structure),
}

impl CorruptionKind {
    /// The structure that would have been overwritten, where that is known.
    pub fn structure(self) -> Option<Structure> {
        match self {
            Self::ClusterInMetadata(structure)
            | Self::StructureCountedFree(structure)
            | Self::TableInStructure(structure) => Some(structure),
            _ => None,
        }
    }

    /// What the kind means, for error texts.
    pub fn describe(self) -> &'static str {
        match self {
            Self::L1EntryReservedBits => "L1 entry has reserved bits set",
            Self::L2TableUnaligned => "L1 entry points to an L2 table that is not aligned to a cluster",
            Self::L2TableBeyondEof => "L1 entry points to an L2 table past the end of the file",
            Self::L2TableInMetadata => "L1 entry points to an L2 table in a cluster that other metadata occupies",
            Self::L2EntryReservedBits => "L2 entry has reserved bits set",
            Self::ClusterUnaligned => "L2 entry has a host offset that is not aligned to a cluster",
            Self::CopiedWithoutCluster => "L2 entry has the COPIED flag and no host cluster",
            Self::ClusterInMetadata(_) => "L2 entry has data written to a cluster that metadata occupies",
            Self::ZeroFlagInV2 => "L2 entry has the zero flag in a version 2 image",
            Self::CompressedCopied => "L2 entry of a compressed cluster has the COPIED flag",
            Self::SubclusterAllocAndZero => "L2 bitmap marks a subcluster both allocated and zero",
            Self::SubclusterWithoutCluster => {
                "L2 bitmap marks a subcluster allocated, and the entry has no host cluster"
            }
            Self::CompressedData => "compressed cluster does not decompress to one cluster of data",
            Self::CompressedBeyondEof => "compressed cluster lies past the end of the file",
            Self::CompressedInDataFile => "compressed cluster in an image with an external data file",
            Self::NotAtGuestOffset => {
                "L2 entry has a host offset that is not the guest offset, which an external data file demands"
            }
            Self::RefcountTableEntry => {
                "refcount table entry is not a cluster-aligned offset outside of other metadata"
            }
            Self::RefcountBlockBeyondEof => "refcount table entry points to a block past the end of the file",
            Self::RefcountUnderflow => "cluster has more references than its refcount says",
            Self::ReferencedCountedFree => "cluster that an entry refers to is counted as free",
            Self::MetadataCountedFree | Self::StructureCountedFree(_) => {
                "cluster that holds metadata is counted as free"
            }
            Self::TableInStructure(_) => "L1 entry has an L2 table changed in a cluster that other metadata occupies",
        }
    }
}

/// Why something could not be done with a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapProblem {
    /// There is none of that name.
    Missing,
    /// There is one of that name already.
    Exists,
    /// It was in use when its last user went without saving it.
    Inconsistent,
    /// It is well-formed, and this library cannot use it.
    Unusable {
        /// Why not.
        why: &'static str,
    },
    /// Its table is malformed.
    Damaged {
        /// What is wrong.
        what: &'static str,
        /// The value found.
        value: u64,
    },
}

/// Everything that can go wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The storage reported an error.
    Io {
        /// What was being done.
        op: IoOp,
        /// At which offset of the file.
        offset: u64,
        /// The system's error number (positive).
        errno: i32,
    },
    /// The image is corrupt; the place is named.
    Corrupt(Corruption),
    /// The image carries the corrupt bit, or corruption was found through this handle: it takes no writes.
    MarkedCorrupt,
    /// A field of the header (or of a header extension) is malformed.
    Header {
        /// Name of the field in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
        /// What it should have been.
        expected: &'static str,
    },
    /// An entry of the bitmap directory is malformed.
    BitmapDirectory {
        /// Number of the entry, from 0.
        entry: u32,
        /// Name of the field in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
        /// What it should have been.
        expected: &'static str,
    },
    /// An entry of the snapshot table is malformed.
    SnapshotTable {
        /// Number of the entry, from 0.
        entry: u32,
        /// Name of the field in the specification.
        field: &'static str,
        /// The value found.
        value: u64,
        /// What it should have been.
        expected: &'static str,
    },
    /// There is no such snapshot.
    SnapshotMissing {
        /// The id or name that was looked for.
        wanted: String,
    },
    /// The snapshot is open as a handle of its own.
    SnapshotInUse {
        /// The id or name by which it was to be deleted.
        wanted: String,
    },
    /// Something could not be done with a bitmap.
    Bitmap {
        /// Its name.
        name: String,
        /// Why.
        problem: BitmapProblem,
    },
    /// The file does not start with the qcow2 magic.
    NotQcow2 {
        /// The first four bytes.
        magic: u32,
    },
    /// The image needs a feature that this version does not implement, or that nobody knows.
    Unsupported {
        /// Name of the feature.
        feature: String,
    },
    /// The image refers to another file, and the caller did not allow that.
    BackingDenied {
        /// The reference as stored in the image.
        name: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The image has a backing file and does not say of which format, or one that is not supported.
    BackingFormat {
        /// The backing file.
        name: String,
        /// The format found, if any.
        format: Option<String>,
    },
    /// A file of a backing chain could not be opened.
    Backing {
        /// The backing file.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// The image has an external data file, and the caller did not allow that it is opened.
    DataFileDenied {
        /// The reference as stored in the image.
        name: String,
        /// What to do about it.
        hint: &'static str,
    },
    /// The image has an external data file, stores no name for it, and none was given.
    DataFileMissing,
    /// The external data file could not be opened or made.
    DataFile {
        /// The external data file.
        name: String,
        /// Why.
        source: Box<Error>,
    },
    /// The external data file is also another file of the image or of its backing chain.
    DataFileShared {
        /// The external data file.
        name: String,
    },
    /// A backing chain comes back to a file that is already part of it.
    ChainLoop {
        /// The reference that closes the loop.
        name: String,
    },
    /// A backing chain is longer than the caller's limit.
    ChainTooDeep {
        /// The limit.
        limit: u32,
    },
    /// The dirty bit is set: refcounts have to be rebuilt before the image may be written.
    NeedsRepair,
    /// A write to a handle that was opened for reading.
    ReadOnly,
    /// The handle was opened to be inspected, and gives no access to data.
    InspectOnly,
    /// An earlier failure left the state of the file unknown; this handle writes nothing more.
    Poisoned {
        /// What happened.
        why: &'static str,
    },
    /// Zeroes could not be written without writing data, and the caller had asked for that not to be done.
    NoFallback,
    /// A request reaches past the end of the image.
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request.
        length: u64,
        /// Size of the image.
        size: u64,
    },
    /// An argument of a call is not acceptable.
    Argument {
        /// Name of the argument.
        name: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An argument of a call has a value that it cannot have.
    ArgumentValue {
        /// Name of the argument.
        name: &'static str,
        /// The value.
        value: String,
        /// What it should have been.
        expected: &'static str,
    },
    /// An option was set that the call does not use.
    OptionUnused {
        /// The key.
        key: String,
        /// What the call does.
        here: &'static str,
        /// What the option is for.
        there: &'static str,
    },
    /// No option of that name exists.
    UnknownOption {
        /// The key.
        key: String,
    },
    /// An option has a value that it cannot have (or not together with the others).
    OptionValue {
        /// The key.
        key: String,
        /// The value.
        value: String,
        /// What it should have been.
        expected: String,
    },
    /// The image would grow beyond what its format or the limits of this library can address.
    TooLarge {
        /// What would not fit.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The file exists already and the caller did not ask to replace it.
    Exists {
        /// The file.
        path: String,
    },
    /// A file could not be opened.
    OpenFile {
        /// The file.
        path: String,
        /// The system's error number (positive).
        errno: i32,
    },
    /// Somebody else uses the file in a way that does not go together with this one.
    Locked {
        /// The file; empty if it was not opened by path.
        name: String,
    },
    /// A path or name is not acceptable.
    Path {
        /// The path.
        path: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The caller's progress callback ended the call.
    Cancelled,
    /// A queue has as many requests as it is deep.
    QueueFull,
    /// A request of a queue cannot be taken back.
    NotCancelled {
        /// It has been submitted; else there is none with that number.
        submitted: bool,
    },
    /// A bug: the library panicked; the handle is poisoned.
    Panic {
        /// The panic's message.
        message: String,
    },
}

/// Stable numbers of the C ABI. A number is never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum ErrorCode {
    /// No error.
    None = 0,
    /// [`Error::Io`] and [`Error::OpenFile`].
    Io = 1,
    /// [`Error::Corrupt`] and [`Error::MarkedCorrupt`].
    Corrupt = 2,
    /// [`Error::Header`], [`Error::BitmapDirectory`] and [`Error::SnapshotTable`].
    BadHeader = 3,
    /// [`Error::NotQcow2`].
    NotQcow2 = 4,
    /// [`Error::Unsupported`].
    Unsupported = 5,
    /// [`Error::BackingDenied`] and [`Error::DataFileDenied`].
    BackingDenied = 6,
    /// [`Error::BackingFormat`].
    BackingFormat = 7,
    /// [`Error::ChainLoop`], [`Error::ChainTooDeep`] and [`Error::DataFileShared`].
    Chain = 8,
    /// [`Error::NeedsRepair`].
    NeedsRepair = 9,
    /// [`Error::ReadOnly`] and [`Error::InspectOnly`].
    ReadOnly = 10,
    /// [`Error::Poisoned`].
    Poisoned = 11,
    /// [`Error::OutOfRange`].
    OutOfRange = 12,
    /// [`Error::Argument`], [`Error::ArgumentValue`] and [`Error::Path`].
    Argument = 13,
    /// [`Error::UnknownOption`], [`Error::OptionValue`], [`Error::OptionUnused`] and [`Error::DataFileMissing`].
    Option = 14,
    /// [`Error::TooLarge`].
    TooLarge = 15,
    /// [`Error::Exists`].
    Exists = 16,
    /// [`Error::Panic`].
    Panic = 17,
    /// [`Error::Locked`].
    Locked = 18,
    /// Reserved: a secret is missing or wrong.
    BadSecret = 19,
    /// [`Error::Cancelled`].
    Cancelled = 20,
    /// [`Error::SnapshotMissing`] and [`Error::SnapshotInUse`].
    Snapshot = 23,
    /// [`Error::Bitmap`].
    Bitmap = 24,
    /// [`Error::QueueFull`] and [`Error::NotCancelled`].
    Queue = 30,
}

impl Error {
    /// An I/O error from what the standard library reports.
    pub fn io(op: IoOp, offset: u64, e: &std::io::Error) -> Self {
        Self::Io { op, offset, errno: e.raw_os_error().unwrap_or(libc::EIO) }
    }

    /// A file that could not be opened, from what the standard library reports.
    pub fn open(path: &std::path::Path, e: &std::io::Error) -> Self {
        Self::OpenFile { path: path.display().to_string(), errno: e.raw_os_error().unwrap_or(libc::EIO) }
    }

    /// The stable code.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Io { .. } | Self::OpenFile { .. } => ErrorCode::Io,
            Self::Corrupt(_) | Self::MarkedCorrupt => ErrorCode::Corrupt,
            Self::Header { .. } | Self::BitmapDirectory { .. } | Self::SnapshotTable { .. } => ErrorCode::BadHeader,
            Self::SnapshotMissing { .. } | Self::SnapshotInUse { .. } => ErrorCode::Snapshot,
            Self::Bitmap { .. } => ErrorCode::Bitmap,
            Self::NotQcow2 { .. } => ErrorCode::NotQcow2,
            Self::Unsupported { .. } | Self::NoFallback => ErrorCode::Unsupported,
            Self::BackingDenied { .. } | Self::DataFileDenied { .. } => ErrorCode::BackingDenied,
            Self::BackingFormat { .. } => ErrorCode::BackingFormat,
            Self::Backing { source, .. } | Self::DataFile { source, .. } => source.code(),
            Self::ChainLoop { .. } | Self::ChainTooDeep { .. } | Self::DataFileShared { .. } => ErrorCode::Chain,
            Self::DataFileMissing => ErrorCode::Option,
            Self::NeedsRepair => ErrorCode::NeedsRepair,
            Self::ReadOnly | Self::InspectOnly => ErrorCode::ReadOnly,
            Self::Poisoned { .. } => ErrorCode::Poisoned,
            Self::OutOfRange { .. } => ErrorCode::OutOfRange,
            Self::Argument { .. } | Self::ArgumentValue { .. } | Self::Path { .. } => ErrorCode::Argument,
            Self::UnknownOption { .. } | Self::OptionValue { .. } | Self::OptionUnused { .. } => ErrorCode::Option,
            Self::TooLarge { .. } => ErrorCode::TooLarge,
            Self::Exists { .. } => ErrorCode::Exists,
            Self::Locked { .. } => ErrorCode::Locked,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::QueueFull | Self::NotCancelled { .. } => ErrorCode::Queue,
            Self::Panic { .. } => ErrorCode::Panic,
        }
    }

    /// The (positive) system error number that C calls return, negated.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io { errno, .. } | Self::OpenFile { errno, .. } => *errno,
            Self::Corrupt(_) | Self::MarkedCorrupt | Self::Poisoned { .. } | Self::Panic { .. } => libc::EIO,
            Self::Header { .. } | Self::NotQcow2 { .. } | Self::OutOfRange { .. } => libc::EINVAL,
            Self::BitmapDirectory { .. } | Self::SnapshotTable { .. } => libc::EINVAL,
            Self::Bitmap { problem, .. } => match problem {
                BitmapProblem::Missing => libc::ENOENT,
                BitmapProblem::Exists => libc::EEXIST,
                BitmapProblem::Inconsistent | BitmapProblem::Damaged { .. } => libc::EINVAL,
                BitmapProblem::Unusable { .. } => libc::ENOTSUP,
            },
            Self::Argument { .. } | Self::UnknownOption { .. } | Self::OptionValue { .. } => libc::EINVAL,
            Self::ArgumentValue { .. } | Self::OptionUnused { .. } | Self::Path { .. } => libc::EINVAL,
            Self::Unsupported { .. } | Self::BackingFormat { .. } | Self::NoFallback => libc::ENOTSUP,
            Self::BackingDenied { .. } | Self::DataFileDenied { .. } => libc::EACCES,
            Self::Backing { source, .. } | Self::DataFile { source, .. } => source.errno(),
            Self::ChainLoop { .. } | Self::ChainTooDeep { .. } | Self::DataFileShared { .. } => libc::ELOOP,
            Self::DataFileMissing => libc::EINVAL,
            Self::NeedsRepair => libc::EUCLEAN,
            Self::ReadOnly | Self::InspectOnly => libc::EROFS,
            Self::TooLarge { .. } => libc::EFBIG,
            Self::SnapshotMissing { .. } => libc::ENOENT,
            Self::SnapshotInUse { .. } => libc::EBUSY,
            Self::Exists { .. } => libc::EEXIST,
            Self::Locked { .. } => libc::EBUSY,
            Self::Cancelled => libc::ECANCELED,
            Self::QueueFull => libc::EAGAIN,
            Self::NotCancelled { submitted: true } => libc::EALREADY,
            Self::NotCancelled { submitted: false } => libc::ENOENT,
        }
    }
}

impl fmt::Display for Corruption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "image is corrupt: {}{}{} (0x{:x} at host offset 0x{:x}",
            self.kind.describe(),
            if self.kind.structure().is_some() { ": " } else { "" },
            self.kind.structure().map_or("", Structure::name),
            self.value,
            self.host_offset
        )?;
        match self.guest_offset {
            Some(guest) => write!(f, ", guest offset 0x{guest:x})"),
            None => write!(f, ")"),
        }
    }
}

impl fmt::Display for IoOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Size => "size query",
            Self::Truncate => "truncate",
            Self::Allocate => "allocation of space",
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io { op: op @ (IoOp::Open | IoOp::Flush | IoOp::Size), errno, .. } => {
                write!(f, "{op} failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::Io { op, offset, errno } => {
                write!(f, "{op} at host offset 0x{offset:x} failed: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::Corrupt(c) => c.fmt(f),
            Self::MarkedCorrupt => f.write_str("image is marked corrupt and takes no writes; repair it, or open it read-only"),
            Self::Header { field, value, expected } => write!(f, "header field {field} is {value} (0x{value:x}); expected {expected}"),
            Self::BitmapDirectory { entry, field, value, expected } => {
                write!(f, "bitmap directory entry {entry}: {field} is {value} (0x{value:x}); expected {expected}")
            }
            Self::SnapshotTable { entry, field, value, expected } => {
                write!(f, "snapshot table entry {entry}: {field} is {value} (0x{value:x}); expected {expected}")
            }
            Self::SnapshotMissing { wanted } => write!(f, "the image has no snapshot with the id or name '{wanted}'"),
            Self::SnapshotInUse { wanted } => {
                write!(f, "snapshot '{wanted}' is open as a handle of its own; close that before deleting it")
            }
            Self::Bitmap { name, problem } => match problem {
                BitmapProblem::Missing => write!(f, "there is no bitmap '{name}'"),
                BitmapProblem::Exists => write!(f, "bitmap '{name}' exists already"),
                BitmapProblem::Inconsistent => write!(
                    f,
                    "bitmap '{name}' was in use and not saved, so that it may lack changes; all that can be done is to remove it"
                ),
                BitmapProblem::Unusable { why } => write!(f, "bitmap '{name}' cannot be used: {why}"),
                BitmapProblem::Damaged { what, value } => write!(f, "bitmap '{name}' is damaged: {what} (0x{value:x})"),
            },
            Self::NotQcow2 { magic } => write!(f, "not a qcow2 image: it starts with 0x{magic:08x} instead of 0x514649fb"),
            Self::Unsupported { feature } => write!(f, "the image needs a feature that is not supported: {feature}"),
            Self::BackingDenied { name, hint } => write!(f, "the image refers to backing file '{name}', which is not allowed: {hint}"),
            Self::BackingFormat { name, format: None } => write!(
                f,
                "backing file '{name}' has no declared format, and formats are never guessed; write one into the image, or set option 'backing_fmt_missing' to 'raw'"
            ),
            Self::BackingFormat { name, format: Some(format) } => {
                write!(f, "backing file '{name}' is declared as '{format}'; only qcow2 and raw are supported")
            }
            Self::Backing { name, source } => write!(f, "backing file '{name}': {source}"),
            Self::DataFileDenied { name, hint } => write!(f, "the image has its data in external data file '{name}', which is not allowed: {hint}"),
            Self::DataFileMissing => f.write_str("the image has its data in an external data file and stores no name for it; set option 'data_file', or pass the storage yourself"),
            Self::DataFile { name, source } => write!(f, "external data file '{name}': {source}"),
            Self::DataFileShared { name } => write!(f, "external data file '{name}' is also the image, or a file under it; each needs a file of its own"),
            Self::ChainLoop { name } => write!(f, "backing file '{name}' is already part of the backing chain, which would never end"),
            Self::ChainTooDeep { limit } => write!(f, "backing chain is deeper than {limit} files; raise option 'backing_depth_max' if it is meant to be"),
            Self::NeedsRepair => f.write_str("image has the dirty bit: its refcounts need a repair before it can be written; open it read-only, or repair it"),
            Self::ReadOnly => f.write_str("image was opened read-only"),
            Self::InspectOnly => f.write_str("image was opened with 'inspect', which gives no access to guest data"),
            Self::Poisoned { why } => write!(f, "image handle takes no more writes: {why}; close it and open the image again"),
            Self::NoFallback => f.write_str("part of the range cannot become zero without writing data, which was not allowed"),
            Self::OutOfRange { offset, length, size } => {
                write!(f, "request of {length} bytes at guest offset {offset} reaches past the end of the image ({size} bytes)")
            }
            Self::Argument { name, why } => write!(f, "argument '{name}' {why}"),
            Self::ArgumentValue { name, value, expected } => write!(f, "argument '{name}' is {value}: expected {expected}"),
            Self::OptionUnused { key, here, there } => {
                write!(f, "option '{key}' means nothing for {here}: it is for {there}; leave it out")
            }
            Self::UnknownOption { key } => write!(f, "unknown option '{key}'"),
            Self::OptionValue { key, value, expected } => write!(f, "option '{key}' cannot be '{value}': expected {expected}"),
            Self::TooLarge { what, limit } => write!(f, "{what} would exceed the limit of {limit}"),
            Self::Locked { name } => write!(
                f,
                "'{name}' is in use by somebody whose use does not go together with this one; close it there, open it read-only, or set option 'locking' if you know better"
            ),
            Self::OpenFile { path, errno } => {
                write!(f, "'{path}' cannot be opened: {}", std::io::Error::from_raw_os_error(*errno))
            }
            Self::Exists { path } => write!(f, "'{path}' exists already; pass the overwrite flag to replace it"),
            Self::Path { path, why } => write!(f, "path '{path}' {why}"),
            Self::Cancelled => f.write_str("cancelled by the caller"),
            Self::QueueFull => f.write_str("the queue has as many requests as it is deep; reap some first"),
            Self::NotCancelled { submitted: true } => f.write_str("the request has been submitted already"),
            Self::NotCancelled { submitted: false } => f.write_str("the queue has no request with that user_data"),
            Self::Panic { message } => write!(f, "internal error (this is a bug in libqcow2): {message}"),
        }
    }
}

impl std::error::Error for Error {}
