//! D10 at every crash state: a bitmap is marked in use, or covers every change since it was started. Scripts of changes
//! and operations on bitmaps run on a simulated disk; at every step the disks that a crash may leave are judged: their
//! structure, what the guest reads, and each bitmap against what it has to cover. Then the same with every call of the
//! storage failing in turn.
//!
//! What a bitmap has to cover is told by contents: a sector that reads as it did when the bitmap was started (or as it
//! was left while the bitmap was disabled) need not be dirty, and any other must be.
//!
//! The first part is run by the campaign; `BITMAP_FAULT_RUNS` sets how many runs the second makes.

use crate::campaign::{Job, REOPEN_ONE_IN, Share, Tally, weight};
use crate::number;
use crate::qemu;
use crate::stage;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use crate::judge::{self, Judge, Layout};
use crate::stage::{Case, Guest, Start, cases, judge_sample, options, pattern, squeezable};
use qcow2::format::GuestOffset;
use qcow2::image::options::Discard;
use qcow2::image::{BitmapOptions, Image, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, SECTOR_BYTES, Scheduler, SimDisk, SimIo, Task};
use qcow2::storage::{Blocking, Io, IoSrc, Storage};

type Content = Rc<[u8; SECTOR_BYTES]>;

/// One bitmap: for each sector the contents that need no bit.
#[derive(Debug, Clone)]
struct Tracked {
    enabled: bool,
    unchanged: BTreeMap<u64, Vec<Content>>,
}

type Bitmaps = BTreeMap<String, Tracked>;

/// What is known about the guest and its bitmaps.
struct World {
    guest: Guest,
    /// What the bitmaps may be: several, while an operation is under way or if it has failed.
    bitmaps: Vec<Bitmaps>,
    touched: BTreeSet<u64>,
    /// Sectors of which a change has failed: they hold the old or the new.
    failed: BTreeSet<u64>,
    /// What the hot sectors hold in each snapshot.
    snapshots: Vec<Vec<(u64, Content)>>,
}

impl World {
    fn new(start: &Start, bitmaps: &Bitmaps) -> Self {
        let (touched, failed) = (BTreeSet::new(), BTreeSet::new());
        let hot = |contents: &Vec<Content>| start.hot_sectors.iter().copied().zip(contents.iter().cloned()).collect();
        let snapshots = start.snapshots.iter().map(hot).collect();
        Self { guest: start.guest(), bitmaps: vec![bitmaps.clone()], touched, failed, snapshots }
    }

    fn contents(&self) -> BTreeMap<u64, Vec<Content>> {
        let contents = |sector| match self.failed.contains(&sector) {
            true => self.guest.possible(sector).collect(),
            false => vec![Rc::new(*self.guest.latest(sector))],
        };
        self.guest.sectors().map(|sector| (sector, contents(sector))).collect()
    }

    /// A change is about to be sent.
    fn issue(&mut self, offset: u64, data: &[u8]) -> stage::Ticket {
        let ticket = self.guest.issue(offset, data);
        for sector in offset / 512..(offset + data.len() as u64).div_ceil(512) {
            self.touched.insert(sector);
            let content = Rc::new(*self.guest.latest(sector));
            for tracked in self.bitmaps.iter_mut().flat_map(BTreeMap::values_mut).filter(|t| !t.enabled) {
                tracked.unchanged.get_mut(&sector).unwrap().push(content.clone());
            }
        }
        ticket
    }

    /// What is wrong with the bitmaps of a crash image.
    fn judge(&self, image: &DiskImage) -> Option<String> {
        let layout = Layout::parse(image).ok()?; // said by somebody else
        let found = judge::bitmaps(&layout).ok()?;
        let mut contents = BTreeMap::new();
        for &sector in &self.touched {
            let mut content = [0; SECTOR_BYTES];
            if let Ok(Some(())) = layout.read(0, sector, &mut content) {
                contents.insert(sector, content);
            }
        }
        let mut wrong = None;
        for candidate in &self.bitmaps {
            let names: BTreeSet<&str> = candidate.keys().map(String::as_str).collect();
            if names != found.iter().map(|bitmap| &bitmap.name[..]).collect() {
                wrong = Some(format!("D10: there are bitmaps {:?}", found.iter().map(|b| &b.name).collect::<Vec<_>>()));
                continue;
            }
            let missed = found.iter().filter(|bitmap| !bitmap.in_use).find_map(|bitmap| {
                let tracked = &candidate[&bitmap.name];
                if bitmap.auto != tracked.enabled {
                    return Some(format!("D10: bitmap {} is enabled: {}", bitmap.name, bitmap.auto));
                }
                let uncovered = |(sector, content): (&u64, &[u8; SECTOR_BYTES])| {
                    !tracked.unchanged[sector].iter().any(|old| **old == *content) && !bitmap.is_dirty(&layout, *sector)
                };
                let sector = contents.iter().find(|&entry| uncovered(entry))?.0;
                Some(format!(
                    "D10: bitmap {} is not in use, and does not cover the change of sector {sector}",
                    bitmap.name
                ))
            });
            match missed {
                None => return None,
                some => wrong = some,
            }
        }
        wrong
    }
}

#[derive(Debug, Clone)]
enum Step {
    Write { offset: u64, length: u64, fua: bool },
    Compressed { offset: u64, length: u64 },
    Apply(usize),
    Zero { offset: u64, length: u64, unmap: bool },
    Discard { offset: u64, length: u64 },
    Flush,
    Add { name: String, granularity: u64, disabled: bool },
    Remove(String),
    Clear(String),
    Enable(String, bool),
    Merge(String, String),
}

fn random_operation(rng: &mut Rng, there: &Bitmaps) -> Step {
    let name = format!("b{}", rng.below(3));
    if !there.contains_key(&name) {
        return Step::Add { name, granularity: [0, 512, 4096, 65536][rng.below(4) as usize], disabled: rng.one_in(3) };
    }
    match rng.below(6) {
        0 => Step::Remove(name),
        1 => Step::Clear(name),
        2 | 3 => {
            let enabled = there[&name].enabled;
            Step::Enable(name, !enabled)
        }
        _ => {
            let from = there.keys().nth(rng.below(there.len() as u64) as usize).unwrap();
            Step::Merge(name, from.clone())
        }
    }
}

fn random_change(rng: &mut Rng, start: &Start) -> Step {
    let align = if rng.one_in(3) { 1 } else { 512 };
    let (offset, length) = start.random_range(rng, align);
    match rng.below(11) {
        0 => Step::Flush,
        10 => {
            let (offset, length) = start.random_cluster(rng);
            Step::Compressed { offset, length }
        }
        1 => Step::Zero { offset, length, unmap: rng.one_in(2) },
        2 => {
            let (offset, length) = start.random_cluster(rng);
            Step::Discard { offset, length }
        }
        _ => Step::Write { offset, length, fua: rng.one_in(8) },
    }
}

/// What an operation makes of the bitmaps; `None` if it cannot be done with them.
fn after(step: &Step, world: &World, bitmaps: &Bitmaps) -> Option<Bitmaps> {
    let mut next = bitmaps.clone();
    match step {
        Step::Add { name, disabled, .. } => {
            next.insert(name.clone(), Tracked { enabled: !disabled, unchanged: world.contents() });
        }
        Step::Remove(name) => drop(next.remove(name)),
        Step::Clear(name) => next.get_mut(name)?.unchanged = world.contents(),
        Step::Enable(name, on) => next.get_mut(name)?.enabled = *on,
        Step::Merge(to, from) => {
            let from = next.get(from)?.unchanged.clone();
            for (sector, contents) in &mut next.get_mut(to)?.unchanged {
                contents.retain(|content| from[sector].contains(content));
            }
        }
        _ => {}
    }
    Some(next)
}

async fn perform<I: Io>(image: &Image, io: &I, world: &RefCell<World>, op: u64, step: Step) -> qcow2::Result<()> {
    let sectors = match &step {
        Step::Write { offset, length, .. }
        | Step::Compressed { offset, length }
        | Step::Zero { offset, length, .. }
        | Step::Discard { offset, length } => offset / 512..(offset + length).div_ceil(512),
        _ => 0..0,
    };
    let result = try_to_perform(image, io, world, op, step).await;
    if result.is_err() {
        world.borrow_mut().failed.extend(sectors);
    }
    result
}

async fn try_to_perform<I: Io>(
    image: &Image,
    io: &I,
    world: &RefCell<World>,
    op: u64,
    step: Step,
) -> qcow2::Result<()> {
    match step {
        Step::Write { offset, length, fua } => {
            let data = pattern(op, offset, length);
            let ticket = world.borrow_mut().issue(offset, &data);
            image
                .write_with(
                    io,
                    &[IoSrc::from(&data[..])],
                    GuestOffset(offset),
                    WriteFlags { fua, ..WriteFlags::default() },
                )
                .await?;
            match fua {
                true => world.borrow_mut().guest.forced(&ticket),
                false => world.borrow_mut().guest.complete(&ticket),
            }
        }
        Step::Compressed { offset, length } => {
            let data = squeezable(op, offset, length);
            let ticket = world.borrow_mut().issue(offset, &data);
            let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
            image.write_with(io, &[IoSrc::from(&data[..])], GuestOffset(offset), flags).await?;
            world.borrow_mut().guest.complete(&ticket);
        }
        Step::Apply(index) => {
            let contents = world.borrow().snapshots[index].clone();
            let issue = |(sector, content): &(u64, Content)| world.borrow_mut().issue(sector * 512, &content[..]);
            let tickets: Vec<_> = contents.iter().map(issue).collect();
            image.snapshot_apply_with(io, &format!("s{index}")).await?;
            let mut world = world.borrow_mut();
            tickets.iter().for_each(|ticket| world.guest.complete(ticket));
            let now = world.guest.now();
            world.guest.flushed(now);
        }
        Step::Zero { offset, length, unmap } => {
            let ticket = world.borrow_mut().issue(offset, &vec![0; length as usize]);
            let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
            image.write_zeroes_with(io, GuestOffset(offset), length, flags).await?;
            world.borrow_mut().guest.complete(&ticket);
        }
        Step::Discard { offset, length } => {
            let ticket = world.borrow_mut().issue(offset, &vec![0; length as usize]);
            image.discard_with(io, GuestOffset(offset), length).await?;
            world.borrow_mut().guest.complete(&ticket);
        }
        Step::Flush => {
            let began = world.borrow().guest.now();
            image.flush_with(io).await?;
            world.borrow_mut().guest.flushed(began);
        }
        operation => {
            // Until it is done, the old bitmaps and the new ones will do. (What was acknowledged before is durable
            // once the image is held, and nothing is written here meanwhile.)
            let began = world.borrow().guest.now();
            let before = world.borrow().bitmaps.len();
            let next: Vec<Bitmaps> = {
                let world = world.borrow();
                world.bitmaps.iter().filter_map(|bitmaps| after(&operation, &world, bitmaps)).collect()
            };
            world.borrow_mut().bitmaps.extend(next);
            operate(image, io, &operation).await?;
            let mut world = world.borrow_mut();
            world.bitmaps.drain(..before);
            world.guest.flushed(began);
        }
    }
    Ok(())
}

async fn operate<I: Io>(image: &Image, io: &I, operation: &Step) -> qcow2::Result<()> {
    match operation {
        Step::Add { name, granularity, disabled } => {
            let options = BitmapOptions { granularity_bytes: *granularity, disabled: *disabled };
            image.bitmap_add_with(io, name, options).await
        }
        Step::Remove(name) => image.bitmap_remove_with(io, name).await,
        Step::Clear(name) => image.bitmap_clear_with(io, name).await,
        Step::Enable(name, on) => image.bitmap_enable_with(io, name, *on).await,
        Step::Merge(to, from) => image.bitmap_merge_with(io, to, None, from).await,
        _ => unreachable!("the others are no operations on bitmaps"),
    }
}

async fn open<I: Io>(io: &I, disk: &Arc<SimDisk>, start: &Start, cache: u64) -> qcow2::Result<Image> {
    let storage: Arc<dyn Storage> = disk.clone();
    let mut options = options(start, cache);
    options.discard = Discard::Unmap;
    Image::open_with(io, storage, &options).await
}

/// An image to start from, with what QEMU makes of bitmaps in it.
fn make(case: &Case, dir: &qemu::Dir, with_bitmaps: bool) -> (Start, Bitmaps) {
    let mut start = case.make(dir);
    let path = dir.path("start.qcow2");
    let mut bitmaps = Bitmaps::new();
    if with_bitmaps {
        qemu::img(&["bitmap", "--add", "-g", "4096", &path, "b0"]);
        qemu::img(&["bitmap", "--add", "--disable", &path, "b1"]);
        start.image = DiskImage::new(std::fs::read(&path).unwrap());
        let world = World::new(&start, &bitmaps);
        for (name, enabled) in [("b0", true), ("b1", false)] {
            bitmaps.insert(name.into(), Tracked { enabled, unchanged: world.contents() });
        }
    }
    (start, bitmaps)
}

fn bitmap_cases() -> Vec<Case> {
    cases().into_iter().filter(|case| !case.options.contains("compat=0.10")).collect()
}

/// Judges all crash states of this moment.
fn look(
    (disk, start, world): (&SimDisk, &Start, &World),
    rng: &mut Rng,
    judge: &mut Judge,
    (share, tally): (&Share<'_>, &mut Tally),
    label: &dyn Fn() -> String,
) {
    let mut sampling = Rng::new(rng.next_u64());
    let sparse = (start.hot_sectors.len() as u64 / 32).max(1);
    tally.states += disk.crash_states(rng, CrashBudget { singles: 8, random: 5 }, |image| {
        let mut wrong = judge_sample(judge, image, &world.guest, start, sampling.next_u64() >> 32, sparse);
        wrong.extend(world.judge(image));
        let clean = wrong.is_empty();
        tally.add(wrong, label);
        if clean && sampling.one_in(REOPEN_ONE_IN) {
            tally.reopened += 1;
            tally.add(reopen(judge, image, start, sampling.next_u64()), label);
        }
        if clean && share.shows_qemu(&mut sampling) {
            share.ask_qemu(judge, [image, &DiskImage::empty()], tally, label);
        }
    });
}

/// Opens a crash image, changes it and closes it: marks that a crash left stay, and the other bitmaps gain the change.
fn reopen(judge: &mut Judge, image: &DiskImage, start: &Start, seed: u64) -> Vec<String> {
    let layout = Layout::parse(image).unwrap();
    let before = judge::bitmaps(&layout).unwrap();
    let disk = Arc::new(SimDisk::new(image.clone()));
    let again = qcow2::wait::block_on(open(&Blocking, &disk, start, 0)).unwrap();
    let (offset, length) = start.random_range(&mut Rng::new(seed), 512);
    again.pwrite(&pattern(800_000, offset, length), offset).unwrap();
    again.close().unwrap();
    let after_image = disk.durable();
    let mut wrong = judge.judge(&after_image).violations;
    let after_layout = Layout::parse(&after_image).unwrap();
    let after = judge::bitmaps(&after_layout).unwrap();
    for (before, after) in before.iter().zip(&after) {
        if (&before.name, before.in_use, before.auto) != (&after.name, after.in_use, after.auto) {
            wrong.push(format!("after reopen: {} was {before:?} and is {after:?}", before.name));
            continue;
        }
        let mut expected: BTreeSet<u64> = before.dirty(&layout).into_iter().collect();
        if before.auto && !before.in_use {
            let g = before.granularity;
            expected.extend((offset / g..=(offset + length - 1) / g).map(|n| n * g));
        }
        if expected != after.dirty(&after_layout).into_iter().collect() {
            wrong.push(format!("after reopen: bitmap {} is not what it was and what was written", before.name));
        }
    }
    wrong
}

fn run_script(
    start: &Start,
    bitmaps: &Bitmaps,
    seed: u64,
    judge: &mut Judge,
    (share, tally): (&Share<'_>, &mut Tally),
) {
    let mut rng = Rng::new(seed);
    let disk = Arc::new(SimDisk::new(start.image.clone()));
    let io = SimIo::new(rng.next_u64(), 1, vec![disk.clone()]);
    let world = RefCell::new(World::new(start, bitmaps));
    let mut scheduler = Scheduler::new(rng.next_u64());
    let (mut look_rng, mut seen) = (Rng::new(rng.next_u64()), u64::MAX);
    let mut watch = |label: &dyn Fn() -> String, tally: &mut Tally| {
        if std::mem::replace(&mut seen, disk.changes()) != disk.changes() {
            let label = || format!("seed {seed}, {}", label());
            look((&disk, start, &world.borrow()), &mut look_rng, judge, (share, tally), &label);
        }
    };
    let cache = if rng.one_in(3) { 4 * start.cluster.min(4096) } else { 0 };
    let mut op = 1;
    for session in 0..1 + rng.below(2) {
        let image =
            scheduler.run_one(open(&io, &disk, start, cache), || watch(&|| "open".into(), tally)).unwrap().unwrap();
        for _ in 0..3 + rng.below(7) {
            let steps = if rng.one_in(3) {
                let (there, snapshots) = (world.borrow().bitmaps[0].clone(), start.snapshots.len() as u64);
                match snapshots > 0 && rng.one_in(4) {
                    true => vec![Step::Apply(rng.below(snapshots) as usize)],
                    false => vec![random_operation(&mut rng, &there)],
                }
            } else {
                group(&mut rng, start)
            };
            let label = format!("session {session}, op {op}: {steps:?}");
            let tasks = (0..)
                .zip(steps)
                .map(|(n, step)| Box::pin(perform(&image, &io, &world, op + n, step)) as Task<'_, qcow2::Result<()>>);
            let results = scheduler.run(tasks.collect(), || watch(&|| label.clone(), tally));
            for result in results.unwrap_or_else(|stuck| panic!("{label}: {stuck:?}")) {
                result.unwrap_or_else(|why| panic!("seed {seed}, {label}: {why}"));
            }
            op += 4;
            if tally.bad() > 0 {
                return;
            }
        }
        let began = world.borrow().guest.now();
        scheduler.run_one(image.close_with(&io), || watch(&|| "close".into(), tally)).unwrap().unwrap();
        world.borrow_mut().guest.flushed(began);
        let end = disk.durable();
        assert_eq!(Judge::default().judge(&end).leaks, 0, "seed {seed}: leaks after a clean close");
        let found = judge::bitmaps(&Layout::parse(&end).unwrap()).unwrap();
        assert!(found.iter().all(|bitmap| !bitmap.in_use), "seed {seed}: closed, and marked in use: {found:?}");
    }
    watch(&|| "closed".into(), tally);
    tally.scripts += 1;
}

/// One change, or two at once that do not overlap.
fn group(rng: &mut Rng, start: &Start) -> Vec<Step> {
    let mut steps = vec![random_change(rng, start)];
    if rng.one_in(3) {
        let range = |step: &Step| match step {
            Step::Write { offset, length, .. }
            | Step::Compressed { offset, length }
            | Step::Zero { offset, length, .. }
            | Step::Discard { offset, length } => offset / 512..(offset + length).div_ceil(512),
            _ => 0..0,
        };
        let second = random_change(rng, start);
        let (a, b) = (range(&steps[0]), range(&second));
        if a.end <= b.start || b.end <= a.start {
            steps.push(second);
        }
    }
    steps
}

/// The rows of the campaign.
pub fn jobs() -> Vec<Job> {
    let job = |case: Case| Job {
        kind: "bitmaps",
        name: case.name.into(),
        weight: weight(&case),
        run: Box::new(move |share| {
            let starts = [make(&case, share.dir, false), make(&case, share.dir, true)];
            let (mut tally, mut judge, mut seed) = (Tally::default(), Judge::default(), share.seed);
            while share.goes_on(&tally) {
                let (start, bitmaps) = &starts[seed as usize % 2];
                run_script(start, bitmaps, seed, &mut judge, (share, &mut tally));
                seed += 1;
            }
            tally.leaks = judge.leaking;
            tally
        }),
    };
    bitmap_cases().into_iter().map(job).collect()
}

#[test]
fn every_failing_call_leaves_bitmaps_marked_or_right() {
    let Some(dir) = qemu::dir("bitmap-faults") else { return };
    let cases = bitmap_cases();
    let budget = number("BITMAP_FAULT_RUNS", 1_200) / cases.len() as u64;
    for case in &cases {
        let starts = [make(case, &dir, false), make(case, &dir, true)];
        let (mut runs, mut seed, mut hit) = (0, 1, 0);
        while runs < budget {
            let (start, bitmaps) = &starts[seed as usize % 2];
            let (calls, ..) = run_with_fault(start, bitmaps, seed, None);
            for index in 0..calls {
                for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                    let fault = Fault { index, errno, sticky };
                    let label = format!("{}, seed {seed}, {fault:?}", case.name);
                    let (_, disk, world, closed) = run_with_fault(start, bitmaps, seed, Some(fault));
                    let mut judge = Judge::default();
                    disk.crash_states(&mut Rng::new(index), CrashBudget { singles: 4, random: 3 }, |image| {
                        let mut wrong = judge_sample(&mut judge, image, &world.guest, start, 0, 1);
                        wrong.extend(world.judge(image));
                        assert!(wrong.is_empty(), "{label}: {wrong:#?}");
                    });
                    if closed {
                        let leaks = judge.judge(&disk.durable()).leaks;
                        assert_eq!(leaks, 0, "{label}: leaks after a successful close");
                    }
                    hit += u64::from(disk.fault_hit().is_some());
                    runs += 1;
                }
            }
            seed += 1;
        }
        assert!(hit > 0, "{}: no fault was met", case.name);
    }
}

/// Returns the calls of the storage, the disk, what is known of it, and whether the image could be closed.
fn run_with_fault(
    start: &Start,
    bitmaps: &Bitmaps,
    seed: u64,
    fault: Option<Fault>,
) -> (u64, Arc<SimDisk>, World, bool) {
    let mut rng = Rng::new(seed);
    let disk = Arc::new(SimDisk::new(start.image.clone()));
    disk.set_fault(fault);
    let world = RefCell::new(World::new(start, bitmaps));
    let (mut closed, mut looks) = (false, 0);
    if let Ok(image) = qcow2::wait::block_on(open(&Blocking, &disk, start, 0)) {
        for op in 1..10 {
            // The same steps whether calls fail or not: what the first of the possible bitmaps allow.
            let there = world.borrow().bitmaps[0].clone();
            let step = match rng.one_in(2) {
                true => random_operation(&mut rng, &there),
                false => random_change(&mut rng, start),
            };
            let done = qcow2::wait::block_on(perform(&image, &Blocking, &world, op, step));
            // With several candidates, an operation may not fit what is really there; then it changes nothing.
            let _ = done;
            // What close puts right must be right before: a crash may come first.
            if disk.fault_hit().is_some() && looks < 3 {
                looks += 1;
                let _ = image.flush();
                disk.crash_states(&mut Rng::new(op), CrashBudget { singles: 2, random: 1 }, |image| {
                    let wrong = world.borrow().judge(image);
                    assert!(wrong.is_none(), "seed {seed}, {fault:?}, op {op}: {wrong:?}");
                });
            }
            if world.borrow().bitmaps.len() > 8 {
                break;
            }
        }
        let began = world.borrow().guest.now();
        closed = image.close().is_ok();
        if closed {
            world.borrow_mut().guest.flushed(began);
        }
    }
    (disk.calls(), disk, world.into_inner(), closed)
}
