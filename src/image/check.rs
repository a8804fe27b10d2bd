//! Checking and repairing an image that nobody has open: what [`crate::check`] needs around it, which is a header
//! that can be read although its refcount table cannot, and the locks. Nothing that the image refers to is opened.

use std::path::Path;
use std::sync::Arc;

use super::backing::open_file;
use super::load::{load_header, load_header_leniently};
use super::open::HeldLock;
use super::options::{Locking, LogLevel, OpenOptions};
pub use crate::check::{
    CheckOptions, CheckResult, Finding, FindingKind, MEMORY_BYTES_DEFAULT, MEMORY_BYTES_MIN, OnFinding, Repair,
};
use crate::error::{Error, IoOp, Result};
use crate::format::Header;
use crate::storage::lock::LockMode;
use crate::storage::{Blocking, Io, Storage};
use crate::tables::file::HostFile;
use crate::wait::block_on;

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
    let _held = HeldLock::take(&storage, mode, name, open)?;
    let header = load_header_leniently(io, &*storage).await?;
    header.check_known()?;
    let size = storage.size().map_err(|e| Error::io(IoOp::Size, 0, &e))?;
    header.check_l1_placement(size)?;
    crate::check::check(io, &HostFile::new(storage), &header, options).await
}
