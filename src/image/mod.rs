//! The handle: an open image, and what is done with it.
//!
//! Each operation exists twice: an `async fn ..._with(io, ...)`, which is the pipeline, generic over how I/O is done
//! (queues, simulators), and a plain function that drives it in the calling thread with inline I/O.

mod allocate;
mod alone;
pub mod backing;
pub mod bitmaps;
pub mod chain;
pub mod check;
mod cluster_cache;
mod compressed;
pub mod create;
mod data_file;
mod decompress;
mod detect;
mod flush;
mod holes;
mod inactive;
pub mod info;
mod link;
pub mod load;
pub mod map;
mod open;
pub mod options;
mod own;
pub mod progress;
mod raw;
mod read;
pub mod resize;
mod rewrite;
mod scratch;
mod snapshot;
mod space;
pub mod status;
mod whole;
pub mod write;
pub mod zero;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use crate::alloc::Allocator;
use crate::error::Result;
use crate::format::{GuestOffset, Header};
use crate::storage::{Blocking, IoDst, IoSrc, Storage};
use crate::tables::Tables;
use crate::wait::{Claims, Helpers, block_on, block_on_helping, lock};

use bitmaps::Bitmaps;
use chain::{Chain, Content};
use open::HeldLock;
use options::DetectZeroes;
use snapshot::{OpenedSnapshot, OpenedSnapshots};
use status::{CLOSED, CORRUPT, Counters, Status};

pub use bitmaps::{BitmapExtent, BitmapInfo, BitmapOptions};
pub use create::{create, create_reporting, create_with, create_with_data_file, create_with_reporting};
pub use info::Info;
pub use load::load_header;
pub use map::{MapExtent, MapKind};
pub use options::{
    BackingFormat, BackingPolicy, CreateOptions, LogLevel, Logger, MissingFormat, OpenOptions, Preallocation, Resolver,
};
pub use progress::ProgressFn;
pub use resize::ResizeOptions;
pub use snapshot::SnapshotFacts;
pub use status::Stats;
pub use write::WriteFlags;
pub use zero::ZeroFlags;

/// An open image. All calls take `&self` and may come from any number of threads at once.
pub struct Image {
    chain: Chain, // empty if the image was opened to be inspected
    header: Mutex<Arc<Header>>,
    lock: Mutex<Option<Arc<HeldLock>>>, // shared with snapshots that are open as handles of their own
    storage: Arc<dyn Storage>,
    path: PathBuf,
    allocator: Allocator,
    cluster_claims: Claims, // guest clusters that an allocating write works on
    table_claims: Claims,   // L1 entries whose L2 table is being made ours. Taken under a cluster claim, never before
    header_claims: Claims,  // taken under all others
    entries: Claims,        // requests that take neither a pin nor a cluster claim, one number each; see alone
    next_entry: AtomicU64,
    status: Status,
    detect_zeroes: DetectZeroes,
    write_through: bool, // every write ends with a flush
    unmap: bool,         // freed clusters are punched out of the file, and discards are followed
    opened_snapshots: OpenedSnapshots,
    opened_as: Mutex<Option<OpenedSnapshot>>, // this handle is a snapshot of another
    counters: Counters,
    bitmaps: Bitmaps,
    emptied: Mutex<whole::Emptied>,
    log: Option<Logger>,
}

impl Image {
    /// Opens the image in a file. Nothing is written to a file that is refused, or before the first write.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        block_on(Self::open_path_with(&Blocking, path, options))
    }

    /// Opens the image in a storage. Relative names of backing files lead nowhere then: see
    /// [`OpenOptions::backing_storages`] and [`OpenOptions::resolver`].
    pub fn open_storage(storage: Arc<dyn Storage>, options: &OpenOptions) -> Result<Self> {
        block_on(Self::open_with(&Blocking, storage, options))
    }

    /// Size of the guest disk in bytes.
    #[inline]
    pub fn size(&self) -> u64 {
        match self.chain.layers.first() {
            Some(layer) => layer.size_bytes(),
            None => self.header().size_bytes,
        }
    }

    /// The header as it was when the image was opened, with what has been changed by operations on the image since
    /// (its size, its snapshots). It does not follow the refcount table.
    pub fn header(&self) -> Arc<Header> {
        lock(&self.header).clone()
    }

    /// The file that holds the image.
    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// The path that the image was opened by; empty if it was not opened by path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads what the guest sees at `offset` into `pieces`.
    #[inline]
    pub fn read(&self, pieces: &[IoDst<'_>], offset: GuestOffset) -> Result<()> {
        self.block(self.read_with(&Blocking, pieces, offset))
    }

    /// Writes `pieces` at `offset`. After an error, what the range holds is old or new, sector by sector.
    #[inline]
    pub fn write(&self, pieces: &[IoSrc<'_>], offset: GuestOffset, flags: WriteFlags) -> Result<()> {
        self.block(self.write_with(&Blocking, pieces, offset, flags))
    }

    /// As [`Image::read`], into one buffer.
    pub fn pread(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.read(&[IoDst::from(buffer)], GuestOffset(offset))
    }

    /// As [`Image::write`], from one buffer.
    pub fn pwrite(&self, buffer: &[u8], offset: u64) -> Result<()> {
        self.write(&[IoSrc::from(buffer)], GuestOffset(offset), WriteFlags::default())
    }

    /// Makes a range read as zeroes, with as little writing as possible.
    pub fn write_zeroes(&self, offset: u64, length: u64, flags: ZeroFlags) -> Result<()> {
        self.block(self.write_zeroes_with(&Blocking, GuestOffset(offset), length, flags))
    }

    /// Gives up what a range holds, by clusters and subclusters that lie in it as a whole. What was given up reads as
    /// zeroes; the rest stays.
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.block(self.discard_with(&Blocking, GuestOffset(offset), length))
    }

    /// Gives the disk another size, rounded up to a multiple of 512 bytes. What it grows by reads as zeroes. Requests
    /// that come meanwhile wait. `tell` is told how far it has come, and may end it before the new size is in force.
    pub fn resize(&self, size_bytes: u64, options: ResizeOptions, tell: Option<ProgressFn<'_>>) -> Result<()> {
        self.block(self.resize_with(&Blocking, size_bytes, options, tell))
    }

    /// Makes everything durable that was acknowledged before the call: data and what is needed to find it.
    pub fn flush(&self) -> Result<()> {
        self.block(self.flush_with(&Blocking))
    }

    /// What the range reads from: the extent that starts at `offset`, at most `length` long. Neighbouring extents may
    /// be alike; joining them is the caller's.
    pub fn map(&self, offset: GuestOffset, length: u64) -> Result<MapExtent> {
        self.block(self.map_with(&Blocking, offset, length))
    }

    /// Flushes, gives back what can be given back, and ends all use of the handle. No other call may be under way;
    /// requests in queues run to their end first.
    /// Dropping an open image does the same and swallows the error.
    pub fn close(&self) -> Result<()> {
        self.helpers().drain();
        self.block(self.close_with(&Blocking))
    }

    /// Facts about the image. Nothing that it refers to is opened for that.
    pub fn info(&self) -> Info {
        let size = self.storage.size().unwrap_or(0);
        let mut info = Info::new(&self.header(), size, self.storage.allocated_bytes());
        info.corrupt |= self.status.any(CORRUPT);
        // A directory that makes no sense is no reason to know nothing of the image.
        info.bitmaps = self.bitmap_list().unwrap_or_default();
        info
    }

    /// As [`Image::info`], and what has to be read from elsewhere than the header: the snapshots. If that cannot be
    /// done, they are missing; [`Image::snapshots`] says why.
    pub fn info_with_lists(&self) -> Info {
        Info { snapshot_list: self.snapshots().unwrap_or_default(), ..self.info() }
    }

    /// What this handle has counted.
    pub fn stats(&self) -> Stats {
        self.counters.stats()
    }

    /// Ends all writing through this handle, metadata included.
    pub fn poison(&self, why: &'static str) {
        self.status.poison(why);
        // Metadata that is waiting to be written, and requests under way, are stopped below.
        if !self.chain.layers.is_empty() {
            self.active().stop_writes(why);
        }
    }

    /// The queues on this image, and on what it shares with other handles.
    pub(crate) fn helpers(&self) -> &Helpers {
        &self.chain.helpers
    }

    /// Drives a pipeline in the calling thread.
    #[inline]
    fn block<F: Future>(&self, future: F) -> F::Output {
        block_on_helping(future, &[self.helpers()])
    }

    /// The image's own tables; not its backing files'.
    fn active(&self) -> &Tables {
        match &self.chain.layers[0].content {
            Content::Qcow2 { tables, .. } => tables,
            Content::Raw { .. } => unreachable!("the first file of a chain is the qcow2 image"),
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !self.status.any(CLOSED)
            && let Err(e) = self.close()
        {
            self.log(LogLevel::Error, &format!("closing the image failed: {e}"));
        }
    }
}
