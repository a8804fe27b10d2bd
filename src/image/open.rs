//! Opening: the image, then its backing files, each verified before the next is looked for. Nothing is written.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use super::Image;
use super::backing::{Folder, open_file};
use super::bitmaps::Bitmaps;
use super::chain::{Chain, Content, Layer};
use super::check::repair_dirty;
use super::data_file::{self, DataSource};
use super::load::load_header;
use super::options::{
    BackingFormat, DetectZeroes, Discard, Locking, LogLevel, MissingFormat, OpenOptions, OverlapCheck, not_acceptable,
};
use super::snapshot::{OpenedSnapshots, root_named};
use super::status::{CORRUPT, Counters, INSPECT, READ_ONLY, RECORDING, Status, UNLISTED, UNMARKED, UNTOUCHED};
use crate::alloc::Allocator;
use crate::codec;
use crate::error::{Error, Result};
use crate::format::Header;
use crate::format::header::{
    AUTOCLEAR_BITMAPS, BackingName, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY,
};
use crate::storage::lock::LockMode;
use crate::storage::{Identity, Io, Storage};
use crate::tables::Tables;
use crate::tables::external::ExternalData;
use crate::tables::file::HostFile;
use crate::wait::Claims;

/// A file of the chain that has been accepted, before its tables are read.
enum Accepted {
    Qcow2 { name: String, file: HostFile, header: Box<Header>, data: Option<DataSource> },
    Raw { name: String, file: HostFile, size_bytes: u64 },
}

impl Accepted {
    /// The image itself.
    fn image(storage: &Arc<dyn Storage>, header: &Header, options: &OpenOptions) -> Self {
        let file = HostFile::new(Arc::clone(storage)).without_flush(options.cache.no_flush);
        Self::Qcow2 { name: String::new(), file, header: Box::new(header.clone()), data: None }
    }
}

impl Image {
    /// Opens the image in a file. See [`Image::open`].
    pub async fn open_path_with<I: Io>(io: &I, path: &Path, options: &OpenOptions) -> Result<Self> {
        let storage = open_file(path, !(options.read_only || options.inspect || options.snapshot.is_some()))?;
        if options.cache.direct {
            avoid_page_cache(&storage, &path.display().to_string())?;
        }
        let folder = Folder::of(path);
        Self::open_in(io, Arc::new(storage), Some(folder), path.to_path_buf(), options).await
    }

    /// Opens the image in a storage. See [`Image::open_storage`].
    pub async fn open_with<I: Io>(io: &I, storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        if options.cache.direct {
            let expected =
                "another mode for an image that is not opened by path; open its descriptor with O_DIRECT instead";
            return not_acceptable("cache", "direct", expected);
        }
        Self::open_in(io, storage, None, PathBuf::new(), options).await
    }

    async fn open_in<I: Io>(
        io: &I,
        storage: Arc<dyn Storage>,
        folder: Option<Folder>,
        path: PathBuf,
        options: &OpenOptions,
    ) -> Result<Self> {
        options.check()?;
        let read_only = options.read_only || options.inspect || options.snapshot.is_some();
        let mode = match (options.locking, read_only) {
            (Locking::On, _) if options.inspect => Some(LockMode::Inspector),
            (Locking::On, true) => Some(LockMode::Reader),
            (Locking::On, false) => Some(LockMode::Writer),
            (Locking::Shared, true) => Some(LockMode::SharingReader),
            (Locking::Shared, false) => Some(LockMode::SharingWriter),
            (Locking::Off, _) => None,
        };
        let mut held = HeldLock::take(&storage, mode, &path.display(), options)?;
        let header = load_header(io, &*storage).await?;
        let mut bits = if read_only { READ_ONLY } else { UNTOUCHED };
        if options.inspect {
            bits |= INSPECT;
        } else {
            check_usable(&header, &*storage)?;
        }
        if header.incompatible & INCOMPATIBLE_CORRUPT != 0 {
            if !read_only {
                return Err(Error::MarkedCorrupt);
            }
            bits |= CORRUPT;
        }
        let mut header = match &options.snapshot {
            Some(id_or_name) => root_named(io, &storage, &header, id_or_name).await?,
            None => header,
        };
        if !read_only && header.autoclear & AUTOCLEAR_BITMAPS != 0 {
            bits |= RECORDING | UNMARKED;
        }
        if !read_only && options.overlap_check >= OverlapCheck::Cached {
            bits |= UNLISTED;
        }
        let layers = if options.inspect {
            Vec::new()
        } else {
            let mut chain = accept_chain(io, Accepted::image(&storage, &header, options), folder, options).await?;
            if let Some(Accepted::Qcow2 { data: Some(data), .. }) = chain.first() {
                held.data_file = Some(Box::new(HeldLock::take(&data.storage, mode, &data.name, options)?));
            }
            // Only now, when nothing but that keeps it from being opened.
            if header.incompatible & INCOMPATIBLE_DIRTY != 0 && !read_only {
                header = repair_dirty(io, &storage, &header, options).await?;
                check_usable(&header, &*storage)?;
                if let Accepted::Qcow2 { header: accepted, .. } = &mut chain[0] {
                    **accepted = header.clone();
                }
            }
            load_tables(io, chain, options).await?
        };
        let mut image =
            Self::on(Chain::new(layers, options.compressed_cache_size), header, Some(Arc::new(held)), storage, bits);
        image.path = path;
        image.detect_zeroes = options.detect_zeroes;
        image.write_through = options.cache.write_through;
        image.unmap = options.discard == Discard::Unmap;
        image.log = options.log.clone();
        Ok(image)
    }

    /// A handle with nothing set but what it reads from, and what it may do.
    pub(super) fn on(
        chain: Chain,
        header: Header,
        lock: Option<Arc<HeldLock>>,
        storage: Arc<dyn Storage>,
        bits: u32,
    ) -> Self {
        Self {
            chain,
            header: Mutex::new(Arc::new(header)),
            lock: Mutex::new(lock),
            storage,
            path: PathBuf::new(),
            allocator: Allocator::default(),
            cluster_claims: Claims::default(),
            table_claims: Claims::default(),
            header_claims: Claims::default(),
            entries: Claims::default(),
            next_entry: AtomicU64::new(0),
            status: Status::new(bits),
            detect_zeroes: DetectZeroes::default(),
            write_through: false,
            unmap: false,
            opened_snapshots: OpenedSnapshots::default(),
            opened_as: Mutex::new(None),
            counters: Counters::default(),
            bitmaps: Bitmaps::default(),
            emptied: Default::default(),
            log: None,
        }
    }

    /// Hands a line to the caller's log.
    pub(super) fn log(&self, level: LogLevel, text: &str) {
        if let Some(log) = &self.log {
            log(level, text);
        }
    }
}

fn avoid_page_cache(storage: &dyn Storage, name: &str) -> Result<()> {
    let switched = storage.avoid_page_cache();
    switched.or_else(|e| {
        let expected = "writeback: the file system of a file that is opened has no direct access (O_DIRECT)";
        let value = format!("direct, with '{name}' ({e})");
        not_acceptable("cache", &value, expected)
    })
}

/// Refuses what this library cannot handle, and tables that lie where they cannot.
fn check_usable(header: &Header, storage: &dyn Storage) -> Result<()> {
    header.check_supported()?;
    codec::check_supported(header.compression)?;
    let size = storage.size().map_err(|e| Error::io(crate::error::IoOp::Size, 0, &e))?;
    header.check_placement(size)
}

/// Walks down the backing chain. A loop, not a recursion; each file is verified before its own backing file counts.
async fn accept_chain<I: Io>(
    io: &I,
    first: Accepted,
    mut folder: Option<Folder>,
    options: &OpenOptions,
) -> Result<Vec<Accepted>> {
    let mut chain = vec![first];
    let mut seen = Vec::new();
    loop {
        let depth = chain.len() as u32 - 1;
        let Some(Accepted::Qcow2 { name, file, header, data }) = chain.last_mut() else { break };
        if header.backing.is_some() || header.incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            seen.extend(file.storage().identity()); // it refers to others, which must not be it
        }
        *data = find_data_file(header, depth, folder.as_ref(), &mut seen, options).map_err(|e| match e {
            // It tells of no file: so the file is told that misses one.
            e @ Error::DataFileMissing if depth > 0 => Error::Backing { name: name.clone(), source: Box::new(e) },
            e => e,
        })?;
        let Some(backing) = header.backing.clone() else { break };
        if depth >= options.backing_depth_max {
            return Err(Error::ChainTooDeep { limit: options.backing_depth_max });
        }
        let format = backing_format(&backing, options)?;
        let found = find_backing(&backing, format, depth, &mut folder, options)?;
        let storage = found.storage;
        if storage.identity().is_some_and(|identity| seen.contains(&identity)) {
            return Err(Error::ChainLoop { name: backing.name });
        }
        if found.by_name && options.cache.direct {
            avoid_page_cache(&*storage, &backing.name)?;
        }
        if found.by_name {
            lock_backing(&*storage, &backing.name, options)?;
        }
        let accepted = accept_backing(io, storage, &backing.name, format).await;
        chain.push(accepted.map_err(|e| Error::Backing { name: backing.name, source: Box::new(e) })?);
    }
    Ok(chain)
}

/// The external data file of a file of the chain, which must be none of the others.
fn find_data_file(
    header: &Header,
    depth: u32,
    folder: Option<&Folder>,
    seen: &mut Vec<Identity>,
    options: &OpenOptions,
) -> Result<Option<DataSource>> {
    let found = data_file::find(header, depth, folder, options)?;
    if let Some(data) = &found {
        let identity = data.storage.identity();
        if identity.is_some_and(|identity| seen.contains(&identity)) {
            return Err(Error::DataFileShared { name: data.name.clone() });
        }
        seen.extend(identity);
        if data.opened_here && options.cache.direct {
            avoid_page_cache(&*data.storage, &data.name)?;
        }
        if data.opened_here && depth > 0 {
            lock_backing(&*data.storage, &data.name, options)?;
        }
    }
    Ok(found)
}

fn backing_format(backing: &BackingName, options: &OpenOptions) -> Result<BackingFormat> {
    match &backing.format {
        Some(format) => BackingFormat::from_name(format),
        None => (options.backing_fmt_missing == MissingFormat::Raw).then_some(BackingFormat::Raw),
    }
    .ok_or_else(|| Error::BackingFormat { name: backing.name.clone(), format: backing.format.clone() })
}

/// A backing file, and whether it was opened here by its name: those that the caller gives are the caller's to lock.
struct Found {
    storage: Arc<dyn Storage>,
    by_name: bool,
}

/// Given by the caller, found by the caller's resolver, or opened by name where the caller allows that.
fn find_backing(
    backing: &BackingName,
    format: BackingFormat,
    depth: u32,
    folder: &mut Option<Folder>,
    options: &OpenOptions,
) -> Result<Found> {
    if let Some(storage) = options.backing_storages.get(depth as usize) {
        return Ok(Found { storage: storage.clone(), by_name: false });
    }
    let by_name = options.resolver.is_none();
    let found = match (&options.resolver, folder) {
        (Some(resolver), _) => resolver.resolve(&backing.name, format, depth),
        (None, Some(folder)) => folder.open_backing(&backing.name, options.backing),
        (None, None) => Folder::nowhere().open_backing(&backing.name, options.backing),
    };
    match found {
        Ok(storage) => Ok(Found { storage, by_name }),
        Err(denied @ Error::BackingDenied { .. }) => Err(denied),
        Err(e) => Err(Error::Backing { name: backing.name.clone(), source: Box::new(e) }),
    }
}

/// Backing files are read, and must not change meanwhile. The lock goes with the file.
fn lock_backing(storage: &dyn Storage, name: &str, options: &OpenOptions) -> Result<()> {
    match options.locking {
        Locking::Off => Ok(()),
        Locking::On => take_lock(storage, LockMode::Reader, &name, options),
        Locking::Shared => take_lock(storage, LockMode::SharingReader, &name, options),
    }
}

fn take_lock(storage: &dyn Storage, mode: LockMode, name: &dyn Display, options: &OpenOptions) -> Result<()> {
    match storage.lock(mode) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Locked { name: name.to_string() }),
        Err(e) => {
            // File systems without locks exist, and their users had no protection before either.
            if let Some(log) = &options.log {
                log(LogLevel::Warning, &format!("'{name}' cannot be locked, and is used without: {e}"));
            }
            Ok(())
        }
    }
}

/// The lock on the image itself, and that on its external data file, given back when its last handle goes or the open fails: the storage may be the
/// caller's.
pub(super) struct HeldLock {
    storage: Arc<dyn Storage>,
    is_held: bool,
    data_file: Option<Box<HeldLock>>,
}

impl HeldLock {
    pub(super) fn take(
        storage: &Arc<dyn Storage>,
        mode: Option<LockMode>,
        name: &dyn Display,
        options: &OpenOptions,
    ) -> Result<Self> {
        if let Some(mode) = mode {
            take_lock(&**storage, mode, name, options)?;
        }
        Ok(Self { storage: storage.clone(), is_held: mode.is_some(), data_file: None })
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        if self.is_held {
            self.storage.unlock();
        }
    }
}

async fn accept_backing<I: Io>(
    io: &I,
    storage: Arc<dyn Storage>,
    name: &str,
    format: BackingFormat,
) -> Result<Accepted> {
    let (name, file) = (name.to_owned(), HostFile::new(storage));
    if format == BackingFormat::Raw {
        let size_bytes = file.size_bytes()?;
        return Ok(Accepted::Raw { name, file, size_bytes });
    }
    let header = load_header(io, file.storage()).await?;
    check_usable(&header, file.storage())?;
    Ok(Accepted::Qcow2 { name, file, header: Box::new(header), data: None })
}

/// Reads the L1 tables. The image gets half of the L2 cache, or all of it if nothing lies under it; its backing files
/// share the rest, so that a deep chain takes no more memory than the caller allowed.
async fn load_tables<I: Io>(io: &I, chain: Vec<Accepted>, options: &OpenOptions) -> Result<Vec<Layer>> {
    let qcow2_below = chain.iter().skip(1).filter(|a| matches!(a, Accepted::Qcow2 { .. })).count() as u64;
    let whole = options.l2_cache_size;
    let own = if qcow2_below == 0 { whole } else { whole / 2 };
    let below = (whole - own) / qcow2_below.max(1);
    let mut layers = Vec::with_capacity(chain.len());
    for accepted in chain {
        let layer = match accepted {
            Accepted::Raw { name, file, size_bytes } => {
                Layer { name, content: Content::Raw { file: Arc::new(file), size_bytes } }
            }
            Accepted::Qcow2 { name, file, header, data } => {
                let l2_bytes = if layers.is_empty() { own } else { below };
                let compression = header.compression;
                let loaded = Tables::load(io, file, &header, l2_bytes, options.refcount_cache_size).await;
                let mut tables = match (loaded, layers.is_empty()) {
                    (Ok(tables), _) => tables,
                    (Err(e), true) => return Err(e),
                    (Err(e), false) => return Err(Error::Backing { name, source: Box::new(e) }),
                };
                if layers.is_empty() {
                    tables.set_overlap_check(options.overlap_check, &header);
                }
                tables.external = data.map(|data| {
                    let file = HostFile::new(data.storage).without_flush(options.cache.no_flush);
                    ExternalData { file, is_raw: data.is_raw }
                });
                Layer { name, content: Content::Qcow2 { tables: Arc::new(tables), compression } }
            }
        };
        layers.push(layer);
    }
    Ok(layers)
}
