//! Checking an image against itself, and repairing it.
//!
//! A check counts every reference that the header leads to and compares the counts with those that the image stores:
//! ```text
//! walk      header, L1 tables, snapshots, refcount structures, bitmaps   -> counts, findings
//! l2        entries of L2 tables (pure, the inner loop)                  -> counts, findings
//! compare   counts and refcount blocks                                   -> leaks, corruptions, COPIED that is wrong
//! copied    COPIED flags and entries, entry by entry, where need be
//! mend      what becomes of a malformed entry (pure)
//! repair    the order of changes
//! rebuild   new refcount structures beside the old ones; detach: copies of guest clusters that lie in metadata
//! ```
//! Counters cover a window of host clusters that fits into the caller's memory; where the file is larger, the walk is
//! repeated window by window. An L2 table that several trees share is read once and counts as often as it is
//! referred to, so that snapshots cost next to nothing.

pub mod compare;
mod copied;
pub mod counts;
mod detach;
pub mod finding;
pub mod l2;
pub mod mend;
mod rebuild;
mod repair;
mod tables;
mod walk;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::format::header::INCOMPATIBLE_DATA_FILE;
use crate::format::{Geometry, Header, HostOffset};
use crate::storage::{Io, IoDst};
use crate::tables::file::HostFile;

pub use finding::{Finding, FindingKind};
use l2::{Fragments, Rules};
use walk::Area;

/// What a check takes by default.
pub const MEMORY_BYTES_DEFAULT: u64 = 128 << 20;
/// The least that a check can work with.
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// How much is read at once, where it lies together.
const READ_BYTES: usize = 1 << 20;

/// What a check puts right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing: the image is not written to.
    #[default]
    Nothing,
    /// Clusters that are counted and not used.
    Leaks,
    /// Everything that can be put right without a guess.
    All,
}

/// Gets each finding, in no particular order.
pub type OnFinding<'a> = &'a mut (dyn FnMut(&Finding) + Send);
/// Gets units of work done and to be done; `false` ends the check with [`Error::Cancelled`].
pub type OnProgress<'a> = &'a mut (dyn FnMut(u64, u64) -> bool + Send);

/// How to check.
pub struct CheckOptions<'a> {
    /// What to put right.
    pub repair: Repair,
    /// Memory for counters and lists.
    pub memory_bytes: u64,
    /// Told of each finding of the first look; what a repair leaves is in the result.
    pub on_finding: Option<OnFinding<'a>>,
    /// Told how far it is.
    pub on_progress: Option<OnProgress<'a>>,
}

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        Self { repair: Repair::Nothing, memory_bytes: MEMORY_BYTES_DEFAULT, on_finding: None, on_progress: None }
    }
}

/// The outcome. After a repair: what is left, and how much was put right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Things that are wrong and can lose data.
    pub corruptions: u64,
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// Structures that could not be checked.
    pub check_errors: u64,
    /// Corruptions that were put right.
    pub corruptions_fixed: u64,
    /// Leaks that were put right.
    pub leaks_fixed: u64,
    /// Clusters of the guest disk.
    pub total_clusters: u64,
    /// Those that are allocated.
    pub allocated_clusters: u64,
    /// Allocated ones that do not follow the one before in the file; all compressed ones.
    pub fragmented_clusters: u64,
    /// Compressed ones.
    pub compressed_clusters: u64,
    /// End of the last cluster that is used or counted.
    pub image_end_offset: u64,
}

impl CheckResult {
    /// Nothing is wrong, leaks aside.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}

/// What one look over the whole image adds up to.
#[derive(Debug, Clone, Default)]
struct Sum {
    corruptions: u64,
    copied_wrong: u64, // part of `corruptions`
    leaks: u64,
    check_errors: u64,
    fragments: Fragments,
    /// One past the last cluster that is used or counted, not past the end of the file.
    used_end: u64,
    /// The lowest cluster past the end of the file that something refers to, and one past the highest.
    outside: Option<Range<u64>>,
    /// Refcounts cannot be put right where they are.
    rebuild: bool,
    /// Metadata lies where something else does.
    overlap: bool,
    /// A structure is lost, and with it what it referred to: that looks like leaks, and must not be given up.
    is_lost: bool,
}

/// Which references a walk counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// What the walk itself finds is told and summed up: in the first window.
    report: bool,
    /// What is found of this window is.
    look: bool,
    /// The refcount structures that the header leads to are counted.
    refcounts: bool,
}

/// One check of one image.
struct Checker<'a, 'o, I> {
    io: &'a I,
    file: &'a HostFile,
    header: Header,
    geometry: Geometry,
    file_bytes: u64,
    options: &'a mut CheckOptions<'o>,
    refcounts: compare::RefcountTable,
    snapshots: Vec<Area>,
    /// Areas that are neither L1 nor refcount structures, each counted as metadata.
    areas: Vec<Area>,
    sum: Sum,
    done: u64,
    to_do: u64,
    /// This round of the repair has changed something.
    has_written: AtomicBool,
    buffer: Vec<u8>,
}

/// Checks the image, and repairs what it is asked to. The caller holds the image alone: nobody else reads it where it
/// is repaired, nobody writes it in any case. Nothing is written without [`CheckOptions::repair`].
pub async fn check<I: Io>(
    io: &I,
    file: &HostFile,
    header: &Header,
    options: &mut CheckOptions<'_>,
) -> Result<CheckResult> {
    let mut checker = Checker::new(io, file, header, options).await?;
    let repair = checker.options.repair;
    checker.look().await?;
    let before = checker.result();
    if repair == Repair::Nothing {
        return Ok(before);
    }
    checker.repair(before).await
}

impl<'a, 'o, I: Io> Checker<'a, 'o, I> {
    async fn new(io: &'a I, file: &'a HostFile, header: &'a Header, options: &'a mut CheckOptions<'o>) -> Result<Self> {
        let file_bytes = file.size_bytes()?;
        options.memory_bytes = options.memory_bytes.max(MEMORY_BYTES_MIN);
        let mut checker = Self {
            io,
            file,
            header: header.clone(),
            geometry: header.geometry,
            file_bytes,
            options,
            refcounts: compare::RefcountTable::default(),
            snapshots: Vec::new(),
            areas: Vec::new(),
            sum: Sum::default(),
            done: 0,
            to_do: 1,
            has_written: AtomicBool::new(false),
            buffer: Vec::new(),
        };
        checker.refcounts = checker.read_refcount_table().await?;
        Ok(checker)
    }

    /// One look over everything: counts, compares, tells.
    async fn look(&mut self) -> Result<()> {
        self.sum = Sum::default();
        self.read_areas().await?;
        let mut from = Some(0);
        let mut plan = Plan { report: true, look: true, refcounts: true };
        while let Some(start) = from {
            let mut counts = self.count(start, plan).await?;
            self.sum.outside = counts.outside();
            let copied = self.compare(&mut counts).await?;
            if copied {
                self.tell_copied(&counts).await?;
            }
            from = self.next_window(&counts);
            plan.report = false;
        }
        Ok(())
    }

    fn result(&self) -> CheckResult {
        let sum = &self.sum;
        CheckResult {
            corruptions: sum.corruptions,
            leaks: sum.leaks,
            check_errors: sum.check_errors,
            corruptions_fixed: 0,
            leaks_fixed: 0,
            total_clusters: self.geometry.clusters_for(self.header.size_bytes),
            allocated_clusters: sum.fragments.allocated,
            fragmented_clusters: sum.fragments.fragmented,
            compressed_clusters: sum.fragments.compressed,
            image_end_offset: sum.used_end << self.geometry.cluster_bits,
        }
    }

    fn rules(&self) -> Rules {
        Rules {
            geometry: self.geometry,
            data_file: self.has_data_file(),
            file_bytes: self.file_bytes,
            dropping: self.options.repair == Repair::All,
        }
    }

    fn has_data_file(&self) -> bool {
        self.header.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Clusters of the file; the last need not be complete.
    fn file_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_bytes)
    }

    /// Adds a finding to the sum, as often as it counts, and tells the caller.
    fn find(&mut self, finding: Finding) {
        let n = finding.clusters.max(1);
        match finding.kind {
            FindingKind::Leak => self.sum.leaks += n,
            FindingKind::Unreadable => self.sum.check_errors += n,
            FindingKind::CopiedFlag => {
                self.sum.copied_wrong += n;
                self.sum.corruptions += n;
            }
            _ => self.sum.corruptions += n,
        }
        self.tell(&finding);
    }

    fn tell(&mut self, finding: &Finding) {
        if let Some(on_finding) = &mut self.options.on_finding {
            on_finding(finding);
        }
    }

    /// Reads a range of the file; what lies past its end reads as zeroes.
    async fn read(&self, bytes: &mut [u8], offset: u64) -> Result<()> {
        let got = match offset < self.file_bytes {
            true => self.file.read(self.io, &[IoDst::from(&mut *bytes)], HostOffset(offset)).await?,
            false => 0,
        };
        bytes[got..].fill(0);
        Ok(())
    }

    /// Writes a part of the repair.
    async fn put(&self, bytes: &[u8], offset: HostOffset) -> Result<()> {
        self.has_written.store(true, Ordering::Relaxed);
        self.file.write_bytes(self.io, bytes, offset).await
    }

    /// Tells the caller how far it is.
    fn progress(&mut self, units: u64) -> Result<()> {
        self.done += units;
        self.to_do = self.to_do.max(self.done);
        let (done, to_do) = (self.done, self.to_do);
        let goes_on = self.options.on_progress.as_mut().is_none_or(|on_progress| on_progress(done, to_do));
        if goes_on { Ok(()) } else { Err(Error::Cancelled) }
    }
}
