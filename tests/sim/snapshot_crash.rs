//! Snapshots under crashes and faults. Scripts of writes and snapshot operations run on a simulated disk. At every step
//! each disk that a crash may leave behind is what it was before the operation or what it is after it, as a whole (D9):
//! every sector of the disk and of every snapshot (D7), with no broken structure (D1 to D6). Then the same scripts with
//! each of their I/O calls failing.
//!
//! The first part is run by the campaign; `CRASH_SEED`, `CRASH_CASE` and `FAULT_RUNS` are for the second.

use crate::campaign::{Job, REOPEN_ONE_IN, Share, Tally, weight};
use crate::number;
use crate::qemu;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crate::judge::Judge;
use crate::stage::{Case, Guest, Start, cases, judge_sample, open, pattern, reopen_and_write};
use qcow2::error::ErrorCode;
use qcow2::format::GuestOffset;
use qcow2::image::{BitmapOptions, Image, Preallocation, ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, Scheduler, SimDisk, SimIo};
use qcow2::storage::{Blocking, Io, IoSrc};
use qcow2::wait::block_on;

const FAULT_RUNS_BY_DEFAULT: u64 = 4_000;
const SNAPSHOTS_MAX: usize = 4;

/// What an image may be: what its disk reads as, and (in `start`) what its snapshots do.
#[derive(Clone)]
pub struct World {
    pub guest: Guest,
    pub start: Start,
}

#[derive(Debug, Clone, Copy)]
pub enum Step {
    Write {
        offset: u64,
        length: u64,
        fua: bool,
    },
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    /// Whole clusters.
    Compress {
        offset: u64,
        length: u64,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    Flush,
    Create,
    /// The snapshot with this index, modulo how many there are.
    Apply(usize),
    Delete(usize),
    /// To a size, with what it grows by preallocated.
    Resize(u64, Preallocation),
    /// Adds a bitmap; or disables it if it is there and enabled, or removes it.
    Bitmap,
}

impl World {
    fn new(start: &Start) -> Self {
        Self { guest: start.guest(), start: start.clone() }
    }

    /// The world after a snapshot operation. All of them flush.
    fn after(&self, step: Step) -> Self {
        let mut next = self.clone();
        let sectors: Vec<u64> = self.start.hot_sectors.clone();
        let latest: Vec<_> = sectors.iter().map(|&sector| Rc::new(*self.guest.latest(sector))).collect();
        let content = match step {
            Step::Apply(index) => self.start.snapshots[index].clone(),
            _ => latest,
        };
        next.guest = Guest::new(sectors.into_iter().zip(content.iter().cloned()));
        match step {
            Step::Create => next.start.snapshots.push(content),
            Step::Delete(index) => drop(next.start.snapshots.remove(index)),
            _ => {}
        }
        next
    }
}

fn script(start: &Start, rng: &mut Rng, steps: usize) -> Vec<Step> {
    let mut snapshots = start.snapshots.len();
    (0..steps)
        .map(|_| {
            let (offset, length) = start.random_range(rng, 512);
            let index = rng.below(snapshots.max(1) as u64) as usize;
            match rng.below(16) {
                0..3 if snapshots < SNAPSHOTS_MAX => {
                    snapshots += 1;
                    Step::Create
                }
                3..5 if snapshots > 0 => Step::Apply(index),
                5..7 if snapshots > 0 => {
                    snapshots -= 1;
                    Step::Delete(index)
                }
                7 => Step::Flush,
                8 => Step::Zero { offset, length, unmap: rng.one_in(2) },
                9 => {
                    let (offset, length) = start.random_cluster(rng);
                    Step::Discard { offset, length }
                }
                10 => {
                    let (offset, length) = start.random_cluster(rng);
                    Step::Compress { offset, length }
                }
                _ => Step::Write { offset, length, fua: rng.one_in(8) },
            }
        })
        .collect()
}

/// The worlds that the disk may show now: one, or two while a snapshot operation is under way.
pub struct Worlds {
    now: RefCell<Vec<World>>,
    pub changes: Cell<u64>,
}

impl Worlds {
    pub fn new(start: &Start) -> Self {
        Self { now: RefCell::new(vec![World::new(start)]), changes: Cell::new(0) }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<World>)) {
        change(&mut self.now.borrow_mut());
        self.changes.set(self.changes.get() + 1);
    }

    pub fn guest<R>(&self, f: impl FnOnce(&mut Guest) -> R) -> R {
        self.changes.set(self.changes.get() + 1);
        f(&mut self.now.borrow_mut()[0].guest)
    }

    /// What is wrong with a disk in the world that it is closest to, and that world. A sample of the sectors is looked
    /// at, or all of them: two worlds may differ in a single one.
    pub fn judge(&self, judge: &mut Judge, image: &DiskImage, phase: u64, all: bool) -> (Vec<String>, usize) {
        let worlds = self.now.borrow();
        let sparse = |world: &World| if all { 1 } else { (world.start.hot_sectors.len() as u64 / 64).max(1) };
        let of = |judge: &mut Judge, world: &World| {
            judge_sample(judge, image, &world.guest, &world.start, phase, sparse(world))
        };
        let first = of(judge, &worlds[0]);
        if first.is_empty() || worlds.len() == 1 {
            return (first, 0);
        }
        let second = of(judge, &worlds[1]);
        match second.is_empty() {
            true => (second, 1),
            false => ([vec!["D9: neither the old nor the new state".to_owned()], first, second].concat(), 0),
        }
    }
}

pub async fn perform<I: Io>(image: &Image, io: &I, worlds: &Worlds, op: u64, step: Step) -> qcow2::Result<()> {
    match step {
        Step::Write { offset, length, fua } => {
            let data = pattern(op, offset, length);
            let ticket = worlds.guest(|g| g.issue(offset, &data));
            image
                .write_with(
                    io,
                    &[IoSrc::from(&data[..])],
                    GuestOffset(offset),
                    WriteFlags { fua, ..WriteFlags::default() },
                )
                .await?;
            worlds.guest(|g| if fua { g.forced(&ticket) } else { g.complete(&ticket) });
        }
        Step::Compress { offset, length } => {
            // Little enough to store for several of them to share a host cluster.
            let data = vec![op as u8; length as usize];
            let ticket = worlds.guest(|g| g.issue(offset, &data));
            let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
            image.write_with(io, &[IoSrc::from(&data[..])], GuestOffset(offset), flags).await?;
            worlds.guest(|g| g.complete(&ticket));
        }
        Step::Zero { offset, length, unmap } => {
            let ticket = worlds.guest(|g| g.issue(offset, &vec![0; length as usize]));
            let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
            image.write_zeroes_with(io, GuestOffset(offset), length, flags).await?;
            worlds.guest(|g| g.complete(&ticket));
        }
        Step::Discard { offset, length } => {
            let ticket = worlds.guest(|g| g.issue(offset, &vec![0; length as usize]));
            image.discard_with(io, GuestOffset(offset), length).await?;
            worlds.guest(|g| g.complete(&ticket));
        }
        Step::Flush => {
            let began = worlds.guest(|g| g.now());
            image.flush_with(io).await?;
            worlds.guest(|g| g.flushed(began));
        }
        Step::Resize(size, preallocation) => {
            let ticket = worlds.guest(|g| g.issue_end(image.size() / 512, size / 512));
            let options = ResizeOptions { allow_shrink: true, preallocation };
            match image.resize_with(io, size, options, None).await {
                Err(qcow2::Error::Unsupported { .. }) => worlds.guest(|g| g.retract(&ticket)),
                result => {
                    result?;
                    worlds.guest(|g| g.forced(&ticket));
                }
            }
        }
        Step::Bitmap => {
            // They flush what was acknowledged before, but promise nothing about it.
            match image.bitmap_list_with(io).await?.first() {
                None => image.bitmap_add_with(io, "b", BitmapOptions::default()).await?,
                Some(bitmap) if bitmap.enabled => image.bitmap_enable_with(io, "b", false).await?,
                Some(_) => image.bitmap_remove_with(io, "b").await?,
            }
            worlds.guest(|_| ());
        }
        Step::Create | Step::Apply(_) | Step::Delete(_) => {
            let done = snapshot_step(image, io, worlds, op, step).await;
            // An error means that nothing has happened; unless what is on disk is unknown, and the handle stops.
            let is_known = done.is_ok() || image.snapshots().is_ok() && !is_poisoned(image);
            if is_known {
                worlds.change(|worlds| drop(worlds.remove(usize::from(done.is_err()))));
            }
            done?;
        }
    }
    Ok(())
}

fn is_poisoned(image: &Image) -> bool {
    matches!(image.flush(), Err(e) if e.code() == ErrorCode::Poisoned)
}

async fn snapshot_step<I: Io>(image: &Image, io: &I, worlds: &Worlds, op: u64, step: Step) -> qcow2::Result<()> {
    let next = worlds.now.borrow()[0].after(step);
    worlds.change(|worlds| worlds.push(next));
    let id_of = async |index: usize| {
        let list = image.snapshots_with(io).await?;
        Ok::<_, qcow2::Error>(String::from_utf8(list[index].id.clone()).unwrap())
    };
    match step {
        Step::Create => {
            let facts = SnapshotFacts { date: Some((op as u32, 0)), ..SnapshotFacts::default() };
            image.snapshot_create_with(io, &format!("op{op}"), &facts).await.map(|_| ())
        }
        Step::Apply(index) => image.snapshot_apply_with(io, &id_of(index).await?).await,
        Step::Delete(index) => image.snapshot_delete_with(io, &id_of(index).await?, None).await,
        _ => unreachable!("the steps of snapshots"),
    }
}

/// Refcounts of one or two bits, which have no room for the references of several snapshots.
fn is_narrow(case: &Case) -> bool {
    case.options.split(',').any(|option| ["refcount_bits=1", "refcount_bits=2"].contains(&option))
}

/// Scripts end where a snapshot is refused because refcounts are narrow.
fn is_refused(case: &Case, error: &qcow2::Error) -> bool {
    is_narrow(case) && error.code() == ErrorCode::TooLarge
}

/// Runs one script of the campaign. `label` names it.
pub fn run_script(
    (case, start): (&Case, &Start),
    (seed, label): (u64, &str),
    steps_for: impl FnOnce(&mut Rng) -> Vec<Step>,
    judge: &mut Judge,
    (share, tally): (&Share<'_>, &mut Tally),
) {
    let mut rng = Rng::new(seed);
    let disk = Arc::new(SimDisk::new(start.image.clone()));
    let io = SimIo::new(rng.next_u64(), 1, vec![disk.clone()]);
    let mut scheduler = Scheduler::new(rng.next_u64());
    let worlds = Worlds::new(start);
    let cache = if rng.one_in(3) { 4 * start.cluster.min(4096) } else { 0 };
    let (mut seen, mut sampling, mut choosing) = ((0, 0), Rng::new(rng.next_u64()), Rng::new(rng.next_u64()));
    let mut look = |label: &dyn Fn() -> String, judge: &mut Judge, tally: &mut Tally| {
        let now = (disk.changes(), worlds.changes.get());
        if std::mem::replace(&mut seen, now) == now {
            return;
        }
        tally.states += disk.crash_states(&mut choosing, CrashBudget { singles: 8, random: 6 }, |image| {
            let (phase, reopens) = (sampling.next_u64() >> 32, sampling.one_in(REOPEN_ONE_IN));
            let (wrong, which) = worlds.judge(judge, image, phase, reopens);
            let clean = wrong.is_empty();
            tally.add(wrong, label);
            if clean && reopens {
                tally.reopened += 1;
                let world = worlds.now.borrow()[which].clone();
                let wrong = reopen_and_write(judge, image, &world.guest, &world.start, sampling.next_u64());
                tally.add(wrong, label);
            }
            if clean && share.shows_qemu(&mut sampling) {
                share.ask_qemu(judge, [image, &DiskImage::empty()], tally, label);
            }
        });
    };
    let image = scheduler.run_one(open(&io, &disk, start, cache), || {}).unwrap().unwrap();
    for (op, step) in (1..).zip(steps_for(&mut rng)) {
        let label = || format!("seed {label}, op {op}: {step:?}");
        let Some(step) = within(step, &worlds, start, image.size()) else { continue };
        let done = scheduler.run_one(perform(&image, &io, &worlds, op, step), || look(&label, judge, tally)).unwrap();
        match done {
            Err(e) if is_refused(case, &e) => break,
            Err(e) => tally.add(vec![format!("failed: {e}")], label),
            Ok(()) => {}
        }
        if tally.bad() > 0 {
            return;
        }
    }
    let began = worlds.guest(|g| g.now());
    let close = || format!("seed {label}, close");
    let closed = scheduler.run_one(image.close_with(&io), || look(&close, judge, tally)).unwrap();
    closed.unwrap_or_else(|e| panic!("{}, seed {label}: close: {e}", case.name));
    worlds.guest(|g| g.flushed(began));
    look(&|| format!("seed {label}, closed"), judge, tally);
    let end = disk.durable();
    if judge.judge(&end).leaks > 0 {
        tally.add(vec!["leaks after a clean close".into()], close);
    }
    if share.shows_qemu_the_end(&mut rng) {
        share.ask_qemu(judge, [&end, &DiskImage::empty()], tally, close);
    }
    tally.scripts += 1;
}

/// A step on the disk as it is now: it may have another size, and other snapshots, than when the script was made.
/// `None` where nothing is left of it.
fn within(step: Step, worlds: &Worlds, start: &Start, size: u64) -> Option<Step> {
    let snapshots = worlds.now.borrow()[0].start.snapshots.len();
    let cut = |offset: u64, length: u64| Some(length.min(size.saturating_sub(offset))).filter(|left| *left > 0);
    // Half a cluster is not given up, unless the disk ends there.
    let cut_cluster = |offset: u64, length: u64| {
        cut(offset, length).filter(|left| (offset + left).is_multiple_of(start.cluster) || offset + left == size)
    };
    Some(match step {
        Step::Write { offset, length, fua } => Step::Write { offset, length: cut(offset, length)?, fua },
        Step::Zero { offset, length, unmap } => Step::Zero { offset, length: cut(offset, length)?, unmap },
        Step::Compress { offset, length } => Step::Compress { offset, length: cut_cluster(offset, length)? },
        Step::Discard { offset, length } => Step::Discard { offset, length: cut_cluster(offset, length)? },
        Step::Apply(index) => Step::Apply(index % Some(snapshots).filter(|n| *n > 0)?),
        Step::Delete(index) => Step::Delete(index % Some(snapshots).filter(|n| *n > 0)?),
        other => other,
    })
}

/// The rows of the campaign.
pub fn jobs() -> Vec<Job> {
    let job = |case: Case| Job {
        kind: "snapshots",
        name: case.name.into(),
        weight: 2 * weight(&case),
        run: Box::new(move |share| {
            let start = case.make(share.dir);
            let (mut tally, mut judge, mut seed) = (Tally::default(), Judge::default(), share.seed);
            while share.goes_on(&tally) {
                let steps = |rng: &mut Rng| script(&start, rng, 10);
                run_script((&case, &start), (seed, &seed.to_string()), steps, &mut judge, (share, &mut tally));
                seed += 1;
            }
            tally.leaks = judge.leaking;
            tally
        }),
    };
    cases().into_iter().map(job).collect()
}

fn wanted_cases() -> Vec<Case> {
    let wanted = std::env::var("CRASH_CASE").unwrap_or_default();
    cases().into_iter().filter(|case| case.name.contains(&wanted)).collect()
}

/// Runs a script with a fault; returns the number of I/O calls.
fn run_fault(case: &Case, start: &Start, steps: &[Step], fault: Option<Fault>) -> u64 {
    let label = format!("{}, {fault:?}, {steps:?}", case.name);
    let disk = Arc::new(SimDisk::new(start.image.clone()));
    let Ok(image) = block_on(open(&Blocking, &disk, start, 2 * start.cluster.min(4096))) else { return 0 };
    disk.set_fault(fault.map(|f| Fault { index: f.index + disk.calls(), ..f }));
    let before = disk.calls();
    let worlds = Worlds::new(start);
    let mut errors = Vec::new();
    for (op, &step) in (1..).zip(steps) {
        // After an error it is not known any more what a snapshot would hold, nor which index it has.
        if !errors.is_empty() && is_of_snapshots(step) {
            continue;
        }
        if let Err(e) = block_on(perform(&image, &Blocking, &worlds, op, step)) {
            errors.push(format!("op {op}, {step:?}: {e}"));
        }
        if worlds.now.borrow().len() > 1 {
            break; // the handle writes no more, and which of the two it is remains open
        }
    }
    let began = worlds.guest(|g| g.now());
    let closed = image.close();
    if closed.is_ok() && worlds.now.borrow().len() == 1 {
        worlds.guest(|g| g.flushed(began));
    }
    let mut judge = Judge::default();
    disk.crash_states(&mut Rng::new(1), CrashBudget { singles: 6, random: 4 }, |image| {
        let (wrong, _) = worlds.judge(&mut judge, image, 0, true);
        assert!(wrong.is_empty(), "{label}: {wrong:#?}\n{errors:#?}");
    });
    if closed.is_ok() {
        let hit = disk.fault_hit();
        assert_eq!(
            judge.judge(&disk.durable()).leaks,
            0,
            "{label}: leaks after a successful close; {hit:?} {errors:#?}"
        );
    }
    if let Some(("flush", _)) = disk.fault_hit() {
        assert!(closed.is_err() && !errors.is_empty() || errors.is_empty(), "{label}: a failed flush was forgotten");
        assert!(closed.is_err(), "{label}: close succeeded after a failed flush");
    }
    disk.calls() - before
}

fn is_of_snapshots(step: Step) -> bool {
    matches!(step, Step::Create | Step::Apply(_) | Step::Delete(_))
}

#[test]
fn every_failing_call_leaves_the_old_or_the_new_state() {
    let Some(dir) = qemu::dir("snapshot-faults") else { return };
    let cases = wanted_cases();
    let budget = number("FAULT_RUNS", FAULT_RUNS_BY_DEFAULT) / cases.len() as u64;
    for case in &cases {
        let start = case.make(&dir);
        let (mut runs, mut seed) = (0, number("CRASH_SEED", 1));
        while runs < budget {
            let steps = script(&start, &mut Rng::new(seed), 8);
            let calls = run_fault(case, &start, &steps, None);
            let mut rng = Rng::new(seed);
            for index in (0..calls).filter(|_| rng.one_in(1 + calls / 60)) {
                for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                    run_fault(case, &start, &steps, Some(Fault { index, errno, sticky }));
                    runs += 1;
                }
            }
            seed += 1;
        }
    }
}

/// What a sector may hold in a snapshot that is taken while writes are under way.
fn is_old_or_new(found: &[u8], old: &[u8; 512], writes: &[(u64, Vec<u8>)], sector: u64) -> bool {
    let from = sector * 512;
    let mut allowed = vec![old.to_vec()];
    for (offset, data) in writes {
        if (*offset..offset + data.len() as u64).contains(&from) {
            allowed.push(data[(from - offset) as usize..][..512].to_vec());
        }
    }
    allowed.iter().any(|content| content == found)
}

#[test]
fn a_snapshot_that_is_taken_among_writes_has_each_of_them_or_not() {
    let Some(dir) = qemu::dir("snapshot-interleave") else { return };
    let cases: Vec<Case> = wanted_cases().into_iter().filter(|case| !is_narrow(case)).collect();
    let rounds = number("INTERLEAVINGS", 4_000) / cases.len() as u64;
    for case in &cases {
        let start = case.make(&dir);
        for seed in 0..rounds {
            let label = format!("{}, seed {seed}", case.name);
            let mut rng = Rng::new(seed);
            let disk = Arc::new(SimDisk::new(start.image.clone()));
            let io = SimIo::new(rng.next_u64(), 1, vec![disk.clone()]);
            let mut scheduler = Scheduler::new(rng.next_u64());
            let image = scheduler.run_one(open(&io, &disk, &start, 0), || {}).unwrap().unwrap();
            let writes: Vec<(u64, Vec<u8>)> = (0..2 + rng.below(3))
                .map(|op| {
                    let (offset, length) = start.random_range(&mut rng, 512);
                    (offset, pattern(op + 1, offset, length.next_multiple_of(512).min(start.guest_size - offset)))
                })
                .collect();
            type Step<'a> = qcow2::storage::sim::Task<'a, qcow2::Result<()>>;
            let mut tasks: Vec<Step<'_>> = Vec::new();
            for (offset, data) in &writes {
                let (image, io) = (&image, &io);
                tasks.push(Box::pin(async move {
                    let pieces = [IoSrc::from(&data[..])];
                    image.write_with(io, &pieces, GuestOffset(*offset), WriteFlags::default()).await
                }));
            }
            tasks.push(Box::pin(async {
                image.snapshot_create_with(&io, "now", &SnapshotFacts::default()).await.map(|_| ())
            }));
            for done in scheduler.run(tasks, || {}).unwrap_or_else(|stuck| panic!("{label}: {stuck:?}")) {
                done.unwrap_or_else(|e| panic!("{label}: {e}"));
            }
            let (snapshot, before) = (image.snapshot_open("now").unwrap(), start.guest());
            let mut found = [0; 512];
            for &sector in &start.hot_sectors {
                let old = before.latest(sector);
                snapshot.pread(&mut found, sector * 512).unwrap();
                assert!(is_old_or_new(&found, old, &writes, sector), "{label}: sector {sector} of the snapshot");
                image.pread(&mut found, sector * 512).unwrap();
                let written = writes.iter().any(|(at, data)| (*at..at + data.len() as u64).contains(&(sector * 512)));
                assert!(!written || found != *old, "{label}: sector {sector} of the disk lost its write");
                assert!(is_old_or_new(&found, old, &writes, sector), "{label}: sector {sector} of the disk");
            }
            drop(snapshot);
            image.close().unwrap();
            let end = Judge::default().judge(&disk.durable());
            assert!(end.violations.is_empty() && end.leaks == 0, "{label}: {end:?}");
        }
    }
}
