//! Checking and repairing an image that nobody has open: what [`crate::check`] needs around it, which is a header
//! that can be read although its refcount table cannot, and the locks. Nothing that the image refers to is opened.
//! And checking one that is open, which is held alone meanwhile.

use std::path::Path;
use std::sync::Arc;

use super::Image;
use super::backing::open_file;
use super::load::{load_header, load_header_leniently};
use super::open::HeldLock;
use super::options::{Locking, LogLevel, OpenOptions};
use super::status::READ_ONLY;
pub use crate::check::{
    CheckOptions, CheckResult, Finding, FindingKind, MEMORY_BYTES_DEFAULT, MEMORY_BYTES_MIN, OnFinding, Repair,
};
use crate::error::{Error, IoOp, Result};
use crate::format::Header;
use crate::storage::lock::LockMode;
use crate::storage::{Blocking, Io, Storage};
use crate::tables::file::HostFile;
use crate::wait::{block_on, lock};

/// Repairs an image that was left dirty, before it is opened for writing. The caller holds its lock, and nobody else
/// may be writing: not with locks that are shared.
pub(super) async fn repair_dirty<I: Io>(
    io: &I,
    storage: &Arc<dyn Storage>,
    header: &Header,
    open: &OpenOptions,
) -> Result<Header> {
    if open.locking == Locking::Shared {
        return Err(Error::NeedsRepair);
    }
    let mut options = CheckOptions { repair: Repair::All, memory_bytes: open.check_memory, ..CheckOptions::default() };
    let file = HostFile::new(Arc::clone(storage));
    let result = crate::check::check(io, &file, header, &mut options).await?;
    if let Some(log) = &open.log {
        let (corruptions, leaks) = (result.corruptions_fixed, result.leaks_fixed);
        let text = format!("the image was left dirty: {corruptions} corruptions and {leaks} leaks were put right");
        log(LogLevel::Warning, &text);
    }
    match result.is_sound() {
        true => load_header(io, &**storage).await,
        false => Err(Error::NeedsRepair),
    }
}

/// Checks the image in a file. Of `open`, only the locking and the log count.
pub fn check(path: &Path, open: &OpenOptions, options: &mut CheckOptions<'_>) -> Result<CheckResult> {
    let storage = Arc::new(open_file(path, options.repair != Repair::Nothing)?);
    let name = path.display().to_string();
    block_on(check_with(&Blocking, storage, &name, open, options))
}

/// Checks the image in a storage, which must be able to write and flush if the image is to be repaired. `name` is for
/// errors.
pub async fn check_with<I: Io>(
    io: &I,
    storage: Arc<dyn Storage>,
    name: &str,
    open: &OpenOptions,
    options: &mut CheckOptions<'_>,
) -> Result<CheckResult> {
    let mode = match (open.locking, options.repair) {
        (Locking::On, Repair::Nothing) => Some(LockMode::Reader),
        (Locking::On, _) => Some(LockMode::Writer),
        (Locking::Shared, Repair::Nothing) => Some(LockMode::SharingReader),
        (Locking::Shared, _) => Some(LockMode::SharingWriter),
        (Locking::Off, _) => None,
    };
    let _held = HeldLock::take(&storage, mode, &name, open)?;
    let header = load_header_leniently(io, &*storage).await?;
    header.check_known()?;
    let size = storage.size().map_err(|e| Error::io(IoOp::Size, 0, &e))?;
    header.check_l1_placement(size)?;
    crate::check::check(io, &HostFile::new(storage), &header, options).await
}

impl Image {
    /// Checks the image while it is open, and repairs nothing. Everything acknowledged is made durable first; requests that
    /// come meanwhile wait.
    pub fn check(&self, options: &mut CheckOptions<'_>) -> Result<CheckResult> {
        self.block(self.check_open_with(&Blocking, options))
    }

    /// As [`Image::check`].
    pub async fn check_open_with<I: Io>(&self, io: &I, options: &mut CheckOptions<'_>) -> Result<CheckResult> {
        self.status.check_read()?;
        if options.repair != Repair::Nothing {
            let why = "ask for a repair, and an image is not repaired while it is open; close it, and repair the file";
            return Err(Error::Argument { name: "flags", why });
        }
        if lock(&self.opened_as).is_some() {
            let why = "is a snapshot of an image that is open itself, and may be changing; check that image";
            return Err(Error::Argument { name: "image", why });
        }
        // What is only read is at rest as it is.
        let _alone = match self.status.any(READ_ONLY) {
            true => None,
            false => {
                let alone = self.hold_still(io).await?;
                self.free_all(io).await?;
                Some(alone)
            }
        };
        let file = &self.active().file;
        let header = load_header_leniently(io, file.storage()).await?;
        header.check_l1_placement(file.size_bytes()?)?;
        crate::check::check(io, file, &header, options).await
    }
}
