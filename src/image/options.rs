//! What a caller can say about opening and creating an image, as typed values and by key.
//!
//! The keys are those of `qemu-img create -o` where such a key exists. Setting an option checks its value alone; what
//! does not go together is refused by the call that uses the options.

use std::fmt;
use std::sync::Arc;

use crate::check::MEMORY_BYTES_DEFAULT;
use crate::error::{Error, Result};
use crate::format::header::BACKING_NAME_MAX;
use crate::format::{Compression, Geometry};
use crate::storage::Storage;
pub use crate::tables::overlap::OverlapCheck;

/// How important a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum LogLevel {
    /// Something failed.
    Error = 1,
    /// Something is not as it should be.
    Warning = 2,
    /// Worth knowing.
    Info = 3,
}

/// Receives log lines; called from any thread.
pub type Logger = Arc<dyn Fn(LogLevel, &str) + Send + Sync>;

/// Format of a backing file. Always declared, never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackingFormat {
    /// qcow2.
    Qcow2,
    /// Raw bytes.
    Raw,
}

impl BackingFormat {
    /// The format of that name, if it is one that this library opens.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// Finds backing files and external data files for the library, so that the caller decides what a name in an image may reach.
pub trait Resolver: Send + Sync {
    /// Opens the backing file that an image at `depth` (0: the image that was opened) names.
    fn resolve(&self, name: &str, format: BackingFormat, depth: u32) -> Result<Arc<dyn Storage>>;

    /// Opens the external data file that an image at `depth` names, for writing too if `writable`.
    fn resolve_data_file(&self, name: &str, writable: bool, depth: u32) -> Result<Arc<dyn Storage>> {
        let _ = (writable, depth);
        let hint = "the resolver knows no external data files; pass the storage yourself";
        Err(Error::DataFileDenied { name: name.to_owned(), hint })
    }
}

/// Which backing files and external data files the library may open by itself, by the names that images give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BackingPolicy {
    /// None.
    #[default]
    Deny,
    /// Relative names that stay below the folder of the image that names them.
    Relative,
    /// Any path.
    Any,
}

/// What to do about a backing file whose format the image does not declare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MissingFormat {
    /// Refuse the open.
    #[default]
    Refuse,
    /// Take it as raw.
    Raw,
}

/// What becomes of space that the guest gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Discard {
    /// Discards are followed, and clusters that become free are punched out of the file.
    #[default]
    Unmap,
    /// Discards do nothing; the file keeps the space of freed clusters for itself.
    Ignore,
}

/// What becomes of zeroes that are written as data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// They are data.
    #[default]
    Off,
    /// Whole subclusters of zeroes become zero entries; host clusters stay.
    On,
    /// As `On`, and host clusters that hold nothing any more are let go.
    Unmap,
}

/// What of the system's caching is used, as `qemu-img` calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cache {
    /// Transfers leave the page cache out (O_DIRECT).
    pub direct: bool,
    /// Every write is durable when it returns.
    pub write_through: bool,
    /// Nothing is made durable: a power cut may leave anything. For images that nobody will miss.
    pub no_flush: bool,
}

impl Cache {
    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        let (direct, write_through, no_flush) = match name {
            "writeback" => (false, false, false),
            "direct" | "none" => (true, false, false),
            "writethrough" => (false, true, false),
            "directsync" => (true, true, false),
            "unsafe" => (false, false, true),
            _ => return None,
        };
        Some(Self { direct, write_through, no_flush })
    }
}

/// Whether others are kept from a file while it is in use, and it from theirs: in the way of QEMU, which then takes
/// part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Locking {
    /// One writer, or any number of readers.
    #[default]
    On,
    /// Others may do anything meanwhile, unless they object themselves.
    Shared,
    /// Neither ask nor tell.
    Off,
}

/// How to open an image.
#[derive(Clone)]
pub struct OpenOptions {
    /// Take no writes.
    pub read_only: bool,
    /// Read-only, never open what the image refers to, give no access to data.
    pub inspect: bool,
    /// Read-only, and see the disk as this internal snapshot has it: its id, or the name of the first one of that name.
    pub snapshot: Option<String>,
    /// Backing files that the library may open by name.
    pub backing: BackingPolicy,
    /// Backing files without a declared format.
    pub backing_fmt_missing: MissingFormat,
    /// Most backing files under the image.
    pub backing_depth_max: u32,
    /// Whether others are kept from the files.
    pub locking: Locking,
    /// What of the system's caching is used.
    pub cache: Cache,
    /// What becomes of space that the guest gives up.
    pub discard: Discard,
    /// What becomes of zeroes that are written as data.
    pub detect_zeroes: DetectZeroes,
    /// What writes are checked against.
    pub overlap_check: OverlapCheck,
    /// Bytes of L2 tables kept in memory.
    pub l2_cache_size: u64,
    /// Bytes of refcount blocks kept in memory.
    pub refcount_cache_size: u64,
    /// Bytes of decompressed clusters kept in memory, of the image and its backing files.
    pub compressed_cache_size: u64,
    /// Bytes that the counters of a check may take, also that of a dirty image which is opened for writing.
    pub check_memory: u64,
    /// Backing files given by the caller, nearest first.
    pub backing_storages: Vec<Arc<dyn Storage>>,
    /// External data file of the image, instead of the one that it names. Counts as the caller's own word: `backing`
    /// does not apply.
    pub data_file: Option<String>,
    /// External data files given by the caller, by the depth of the image that they belong to.
    pub data_file_storages: Vec<Option<Arc<dyn Storage>>>,
    /// Asked for every backing file that `backing_storages` does not give, and for external data files.
    pub resolver: Option<Arc<dyn Resolver>>,
    /// Receives log lines.
    pub log: Option<Logger>,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            inspect: false,
            snapshot: None,
            backing: BackingPolicy::default(),
            backing_fmt_missing: MissingFormat::default(),
            backing_depth_max: 200,
            locking: Locking::default(),
            cache: Cache::default(),
            discard: Discard::default(),
            detect_zeroes: DetectZeroes::default(),
            overlap_check: OverlapCheck::default(),
            l2_cache_size: 32 << 20,
            refcount_cache_size: 8 << 20,
            compressed_cache_size: 4 << 20,
            check_memory: MEMORY_BYTES_DEFAULT,
            backing_storages: Vec::new(),
            data_file: None,
            data_file_storages: Vec::new(),
            resolver: None,
            log: None,
        }
    }
}

// By hand: storages, resolver and log have no text of their own.
impl fmt::Debug for OpenOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenOptions")
            .field("read_only", &self.read_only)
            .field("inspect", &self.inspect)
            .field("snapshot", &self.snapshot)
            .field("backing", &self.backing)
            .field("backing_fmt_missing", &self.backing_fmt_missing)
            .field("backing_depth_max", &self.backing_depth_max)
            .field("locking", &self.locking)
            .field("cache", &self.cache)
            .field("discard", &self.discard)
            .field("detect_zeroes", &self.detect_zeroes)
            .field("overlap_check", &self.overlap_check)
            .field("l2_cache_size", &self.l2_cache_size)
            .field("refcount_cache_size", &self.refcount_cache_size)
            .field("compressed_cache_size", &self.compressed_cache_size)
            .field("check_memory", &self.check_memory)
            .field("backing_storages", &self.backing_storages.len())
            .field("data_file", &self.data_file)
            .field("data_file_storages", &self.data_file_storages.iter().map(Option::is_some).collect::<Vec<_>>())
            .field("resolver", &self.resolver.is_some())
            .field("log", &self.log.is_some())
            .finish()
    }
}

impl OpenOptions {
    /// Sets an option by its key.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "read_only" => self.read_only = parse_bool(key, value)?,
            "inspect" => self.inspect = parse_bool(key, value)?,
            "snapshot" if value.is_empty() => return not_acceptable(key, value, "the id or name of a snapshot"),
            "snapshot" => self.snapshot = Some(value.to_owned()),
            "backing" => {
                self.backing = match value {
                    "none" => BackingPolicy::Deny,
                    "relative" => BackingPolicy::Relative,
                    "any" => BackingPolicy::Any,
                    _ => return not_acceptable(key, value, "none, relative or any"),
                }
            }
            "backing_fmt_missing" => {
                self.backing_fmt_missing = match value {
                    "refuse" => MissingFormat::Refuse,
                    "raw" => MissingFormat::Raw,
                    _ => return not_acceptable(key, value, "refuse or raw"),
                }
            }
            "backing_depth_max" => {
                self.backing_depth_max = match value.parse() {
                    Ok(depth) if depth <= DEPTH_MAX => depth,
                    _ => return not_acceptable(key, value, "a number of files from 0 to 1000"),
                }
            }
            "locking" => {
                self.locking = match value {
                    "on" => Locking::On,
                    "shared" => Locking::Shared,
                    "off" => Locking::Off,
                    _ => return not_acceptable(key, value, "on, shared or off"),
                }
            }
            "discard" => {
                self.discard = match value {
                    "unmap" | "on" => Discard::Unmap,
                    "ignore" | "off" => Discard::Ignore,
                    _ => return not_acceptable(key, value, "unmap (or on), or ignore (or off)"),
                }
            }
            "cache" => match Cache::from_name(value) {
                Some(cache) => self.cache = cache,
                None => {
                    return not_acceptable(
                        key,
                        value,
                        "writeback, direct (or none), writethrough, directsync or unsafe",
                    );
                }
            },
            "detect_zeroes" => {
                self.detect_zeroes = match value {
                    "off" => DetectZeroes::Off,
                    "on" => DetectZeroes::On,
                    "unmap" => DetectZeroes::Unmap,
                    _ => return not_acceptable(key, value, "off, on or unmap"),
                }
            }
            "overlap_check" => match OverlapCheck::from_name(value) {
                Some(check) => self.overlap_check = check,
                None => return not_acceptable(key, value, "none, constant, cached or all"),
            },
            "data_file" => {
                check_stored_name(key, value)?;
                self.data_file = Some(value.to_owned());
            }
            "l2_cache_size" => self.l2_cache_size = parse_cache_size(key, value)?,
            "refcount_cache_size" => self.refcount_cache_size = parse_cache_size(key, value)?,
            "compressed_cache_size" => self.compressed_cache_size = parse_cache_size(key, value)?,
            "check_memory" => self.check_memory = parse_cache_size(key, value)?,
            _ => return unknown(key, |o| o.open),
        }
        Ok(())
    }

    /// Checks that the options go together.
    pub fn check(&self) -> Result<()> {
        if self.detect_zeroes == DetectZeroes::Unmap && self.discard == Discard::Ignore {
            return not_acceptable("detect_zeroes", "unmap", "off or on with discard=ignore; use discard=unmap");
        }
        if let (Some(snapshot), true) = (&self.snapshot, self.inspect) {
            return not_acceptable("snapshot", snapshot, "no snapshot with inspect, which gives no access to data");
        }
        Ok(())
    }
}

/// Deepest chain that can be asked for: each file of it costs a descriptor.
const DEPTH_MAX: u32 = 1000;

/// Version of the format, under the names that `qemu-img` has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compat {
    /// Version 2 (0.10).
    V2,
    /// Version 3 (1.1).
    #[default]
    V3,
}

/// How much of a new image, or of what it grows by, is allocated ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing but what an empty image needs.
    #[default]
    Off,
    /// A host cluster for each guest cluster, with the tables that say so. The file gets as long, and not as large.
    Metadata,
    /// As `Metadata`, and the file system sets the space aside.
    Falloc,
    /// As `Metadata`, and zeroes are written.
    Full,
}

impl Preallocation {
    /// The mode of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "off" => Some(Self::Off),
            "metadata" => Some(Self::Metadata),
            "falloc" => Some(Self::Falloc),
            "full" => Some(Self::Full),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Metadata => "metadata",
            Self::Falloc => "falloc",
            Self::Full => "full",
        }
    }
}

/// How to create an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateOptions {
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size_bytes: u64,
    /// Extended L2 entries: 32 subclusters in each cluster.
    pub extended_l2: bool,
    /// Width of refcounts: 1, 2, 4, 8, 16, 32 or 64.
    pub refcount_bits: u32,
    /// Version of the format.
    pub compat: Compat,
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Name of the backing file, stored as it is. The file is not opened.
    pub backing_file: Option<String>,
    /// Format of the backing file; has to be given with it.
    pub backing_fmt: Option<BackingFormat>,
    /// Name of the external data file that guest data goes to, stored as it is. Relative names start from the folder of
    /// the image.
    pub data_file: Option<String>,
    /// The external data file is a raw image of the disk by itself, at every moment.
    pub data_file_raw: bool,
    /// Method of compressed clusters.
    pub compression_type: Compression,
    /// What to allocate ahead.
    pub preallocation: Preallocation,
    /// New files are asked to be overwritten in place, where the file system copies on write (btrfs).
    pub nocow: bool,
    /// New files are asked to have extents of this size in bytes (XFS); 0 asks for nothing.
    pub extent_size_hint_bytes: u32,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            cluster_size_bytes: 64 << 10,
            extended_l2: false,
            refcount_bits: 16,
            compat: Compat::default(),
            lazy_refcounts: false,
            backing_file: None,
            backing_fmt: None,
            data_file: None,
            data_file_raw: false,
            compression_type: Compression::default(),
            preallocation: Preallocation::default(),
            nocow: false,
            extent_size_hint_bytes: 0,
        }
    }
}

impl CreateOptions {
    /// Sets an option by its key.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "cluster_size" => match parse_size(value).filter(|&size| is_cluster_size(size)) {
                Some(size) => self.cluster_size_bytes = size,
                None => return not_acceptable(key, value, CLUSTER_SIZE),
            },
            "extended_l2" => self.extended_l2 = parse_bool(key, value)?,
            "refcount_bits" => match value.parse() {
                Ok(bits) if is_refcount_width(bits) => self.refcount_bits = bits,
                _ => return not_acceptable(key, value, REFCOUNT_BITS),
            },
            "compat" => {
                self.compat = match value {
                    "0.10" | "v2" => Compat::V2,
                    "1.1" | "v3" => Compat::V3,
                    _ => return not_acceptable(key, value, "0.10 (or v2), or 1.1 (or v3)"),
                }
            }
            "lazy_refcounts" => self.lazy_refcounts = parse_bool(key, value)?,
            "backing_file" => {
                check_stored_name(key, value)?;
                self.backing_file = Some(value.to_owned());
            }
            "data_file" => {
                check_stored_name(key, value)?;
                self.data_file = Some(value.to_owned());
            }
            "data_file_raw" => self.data_file_raw = parse_bool(key, value)?,
            "backing_fmt" => match BackingFormat::from_name(value) {
                Some(format) => self.backing_fmt = Some(format),
                None => return not_acceptable(key, value, "qcow2 or raw"),
            },
            "compression_type" => {
                self.compression_type = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => return not_acceptable(key, value, "zlib or zstd"),
                }
            }
            "preallocation" => match Preallocation::from_name(value) {
                Some(mode) => self.preallocation = mode,
                None => return not_acceptable(key, value, "off, metadata, falloc or full"),
            },
            "nocow" => self.nocow = parse_bool(key, value)?,
            "extent_size_hint" => match parse_size(value).and_then(|size| u32::try_from(size).ok()) {
                Some(size) => self.extent_size_hint_bytes = size,
                None => {
                    return not_acceptable(key, value, "a number of bytes below 4G, with an optional suffix k, M or G");
                }
            },
            _ => return unknown(key, |o| o.create),
        }
        Ok(())
    }

    /// Checks each option and that they go together, and gives the geometry that they ask for.
    pub fn geometry(&self) -> Result<Geometry> {
        let (size, bits) = (self.cluster_size_bytes, self.refcount_bits);
        if !is_cluster_size(size) {
            return not_acceptable("cluster_size", &size.to_string(), CLUSTER_SIZE);
        }
        if !is_refcount_width(bits) {
            return not_acceptable("refcount_bits", &bits.to_string(), REFCOUNT_BITS);
        }
        if self.extended_l2 && size < EXTENDED_L2_CLUSTER_SIZE_MIN {
            return not_acceptable("cluster_size", &size.to_string(), "at least 16384 with extended_l2=on");
        }
        if self.compat == Compat::V2 {
            let needs_v3 = |key, value: &str, expected: &str| {
                not_acceptable(key, value, &format!("{expected} with compat=0.10; use compat=1.1"))
            };
            if self.extended_l2 {
                return needs_v3("extended_l2", "on", "off");
            }
            if self.lazy_refcounts {
                return needs_v3("lazy_refcounts", "on", "off");
            }
            if bits != 16 {
                return needs_v3("refcount_bits", &bits.to_string(), "16");
            }
            if self.compression_type != Compression::Zlib {
                return needs_v3("compression_type", "zstd", "zlib");
            }
            if let Some(name) = &self.data_file {
                return needs_v3("data_file", name, "no external data file");
            }
        }
        self.check_backing()?;
        self.check_data_file()?;
        Ok(Geometry {
            version: if self.compat == Compat::V2 { 2 } else { 3 },
            cluster_bits: size.trailing_zeros(),
            extended_l2: self.extended_l2,
            refcount_order: bits.trailing_zeros(),
        })
    }

    fn check_data_file(&self) -> Result<()> {
        if let Some(name) = &self.data_file {
            check_stored_name("data_file", name)?;
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return not_acceptable("data_file_raw", "on", "off with a backing file, of which a raw disk knows nothing");
        }
        Ok(())
    }

    fn check_backing(&self) -> Result<()> {
        match (&self.backing_file, self.backing_fmt) {
            (None, None) => Ok(()),
            // A standard cluster that is allocated hides what lies below.
            (Some(_), Some(_)) if self.preallocation != Preallocation::Off && !self.extended_l2 => not_acceptable(
                "preallocation",
                self.preallocation.name(),
                "off with a backing file, unless extended_l2=on",
            ),
            (Some(name), Some(_)) => check_stored_name("backing_file", name),
            (Some(_), None) => not_acceptable(
                "backing_fmt",
                "",
                "qcow2 or raw, as backing_file is set: the format of a backing file is never guessed",
            ),
            (None, Some(format)) => not_acceptable("backing_fmt", format.name(), "backing_file to be set with it"),
        }
    }
}

const CLUSTER_SIZE: &str = "a power of two from 512 to 2M";
const REFCOUNT_BITS: &str = "1, 2, 4, 8, 16, 32 or 64";
const EXTENDED_L2_CLUSTER_SIZE_MIN: u64 = 16 << 10;

fn is_cluster_size(size: u64) -> bool {
    size.is_power_of_two() && (512..=2 << 20).contains(&size)
}

fn is_refcount_width(bits: u32) -> bool {
    bits.is_power_of_two() && bits <= 64
}

/// The rules that a stored name has to keep so that every reader sees the same one.
fn check_stored_name(key: &str, name: &str) -> Result<()> {
    if name.is_empty() || name.len() > BACKING_NAME_MAX {
        return not_acceptable(key, name, "a name of 1 to 1023 bytes");
    }
    if name.chars().any(char::is_control) {
        return not_acceptable(key, &name.escape_debug().to_string(), "a name without control characters");
    }
    Ok(())
}

/// The kinds of option values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// on, off, true or false.
    Bool,
    /// A number of bytes, with an optional suffix k, M, G or T.
    Size,
    /// A number.
    Number,
    /// Any text.
    Text,
    /// One of a list.
    Choice(&'static [&'static str]),
}

/// Description of one option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionInfo {
    /// The key.
    pub key: &'static str,
    /// Kind of its value.
    pub kind: OptionKind,
    /// Value if it is not set; empty where that means "not set".
    pub default: &'static str,
    /// Used when an image is opened.
    pub open: bool,
    /// Used when an image is created.
    pub create: bool,
    /// Used when a disk gets another size.
    pub resize: bool,
    /// What it does, in one line.
    pub help: &'static str,
}

const fn for_open(key: &'static str, kind: OptionKind, default: &'static str, help: &'static str) -> OptionInfo {
    OptionInfo { key, kind, default, open: true, create: false, resize: false, help }
}

const fn for_create(key: &'static str, kind: OptionKind, default: &'static str, help: &'static str) -> OptionInfo {
    // What is allocated ahead may be there from the beginning, or come with more size.
    let resize = matches!(key.as_bytes(), b"preallocation");
    OptionInfo { key, kind, default, open: false, create: true, resize, help }
}

/// All options that can be set by key.
#[rustfmt::skip]
pub const OPTIONS: &[OptionInfo] = &[
    for_open("read_only", OptionKind::Bool, "off", "take no writes"),
    for_open("inspect", OptionKind::Bool, "off", "read-only, without opening backing files and without access to data"),
    for_open("snapshot", OptionKind::Text, "", "read-only, and the disk as this internal snapshot (id, or else name) has it"),
    for_open("backing", OptionKind::Choice(&["none", "relative", "any"]), "none",
        "backing and data files to open by name: none, names relative to the image's folder, any path"),
    for_open("backing_fmt_missing", OptionKind::Choice(&["refuse", "raw"]), "refuse",
        "what to do about a backing file without a declared format"),
    for_open("backing_depth_max", OptionKind::Number, "200", "most backing files under the image"),
    for_open("locking", OptionKind::Choice(&["on", "shared", "off"]), "on",
        "keep others from the files as QEMU does, let them in, or neither ask nor tell"),
    for_open("cache", OptionKind::Choice(&["writeback", "direct", "none", "writethrough", "directsync", "unsafe"]), "writeback",
        "page cache, or none (O_DIRECT); whether writes wait for the disk; unsafe: nothing ever does"),
    for_open("discard", OptionKind::Choice(&["unmap", "ignore", "on", "off"]), "unmap",
        "whether discards and freed clusters give space back"),
    for_open("detect_zeroes", OptionKind::Choice(&["off", "on", "unmap"]), "off",
        "make zero entries of zeroes that are written as data; unmap: and let go of their host clusters"),
    for_open("overlap_check", OptionKind::Choice(&["none", "constant", "cached", "all"]), "constant",
        "refuse to write over: nothing, header and main tables, L2 tables and refcount blocks too, snapshots and bitmaps too"),
    OptionInfo { key: "data_file", kind: OptionKind::Text, default: "", open: true, create: true, resize: false,
        help: "external data file: its name as stored (create), or the path to use instead of the stored one (open)" },
    for_create("data_file_raw", OptionKind::Bool, "off", "keep the external data file valid as a raw image by itself"),
    for_open("l2_cache_size", OptionKind::Size, "32M", "memory for L2 tables"),
    for_open("refcount_cache_size", OptionKind::Size, "8M", "memory for refcount blocks"),
    for_open("compressed_cache_size", OptionKind::Size, "4M",
        "memory for decompressed clusters, kept for reads of less than a cluster; 0: none"),
    for_open("check_memory", OptionKind::Size, "128M", "memory for the counters of a check, also of a dirty image opened to be written; at least 1M"),
    for_create("cluster_size", OptionKind::Size, "64k", "cluster size, a power of two from 512 to 2M"),
    for_create("extended_l2", OptionKind::Bool, "off", "32 subclusters per cluster (clusters of 16k and more)"),
    for_create("refcount_bits", OptionKind::Choice(&["1", "2", "4", "8", "16", "32", "64"]), "16", "width of refcounts"),
    for_create("compat", OptionKind::Choice(&["0.10", "1.1", "v2", "v3"]), "1.1",
        "version of the format: 0.10 (v2) or 1.1 (v3)"),
    for_create("lazy_refcounts", OptionKind::Bool, "off", "write refcounts late, at the price of a repair after a crash"),
    for_create("backing_file", OptionKind::Text, "", "name of the backing file, stored as given"),
    for_create("backing_fmt", OptionKind::Choice(&["qcow2", "raw"]), "", "format of the backing file; needed with backing_file"),
    for_create("compression_type", OptionKind::Choice(&["zlib", "zstd"]), "zlib", "method of compressed clusters"),
    for_create("preallocation", OptionKind::Choice(&["off", "metadata", "falloc", "full"]), "off",
        "what to allocate ahead: nothing, host clusters, with their space, with zeroes written"),
    for_create("nocow", OptionKind::Bool, "off", "ask btrfs to overwrite the new file in place (a hint, for files made by name)"),
    for_create("extent_size_hint", OptionKind::Size, "0", "ask XFS for extents of this size (a hint, for files made by name); 0: do not ask"),
];

pub(super) fn not_acceptable<T>(key: &str, value: &str, expected: &str) -> Result<T> {
    Err(Error::OptionValue { key: key.into(), value: value.into(), expected: expected.into() })
}

/// An option that exists for the other call is told apart from one that does not exist at all.
fn unknown(key: &str, here: impl Fn(&OptionInfo) -> bool) -> Result<()> {
    match OPTIONS.iter().find(|o| o.key == key) {
        Some(o) if !here(o) && o.create => {
            Err(Error::UnknownOption { key: format!("{key} (it is for creating images)") })
        }
        Some(o) if !here(o) => Err(Error::UnknownOption { key: format!("{key} (it is for opening images)") }),
        _ => Err(Error::UnknownOption { key: key.into() }),
    }
}

fn parse_bool(key: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => not_acceptable(key, value, "on, off, true or false"),
    }
}

/// A number of bytes with an optional suffix of binary multiples, without sign or fraction.
pub fn parse_size(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'k' | b'K' => (&value[..value.len() - 1], 10),
        b'M' => (&value[..value.len() - 1], 20),
        b'G' => (&value[..value.len() - 1], 30),
        b'T' => (&value[..value.len() - 1], 40),
        _ => (value, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn parse_cache_size(key: &str, value: &str) -> Result<u64> {
    match parse_size(value) {
        Some(size) if size <= CACHE_SIZE_MAX => Ok(size),
        _ => not_acceptable(key, value, "a number of bytes up to 1T, with an optional suffix k, M, G or T"),
    }
}

const CACHE_SIZE_MAX: u64 = 1 << 40;

#[cfg(test)]
mod tests;
