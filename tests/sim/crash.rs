//! Crashes. Scripts of writes, flushes and FUA writes run through the engine on a simulated disk; at every step the
//! disks that a crash may leave behind are enumerated and judged by a second reader of the format:
//! no broken structure (D1 to D6), stable sectors and snapshots read what they read at the last flush (D7), others
//! their old value or one issued since (D8); a raw external data file by itself is the disk (D14). A sample is opened again with the
//! library, written, and judged again. The campaign runs them.

use crate::campaign::{Job, REOPEN_ONE_IN, Share, Tally, weight};
use crate::qemu;
use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::judge::Judge;
use crate::number;
use crate::stage::{
    Case, Guest, Start, cases, data_file_cases, disks, judge_durable, judge_files, open, open_disks, pattern,
    reopen_files,
};
use qcow2::format::GuestOffset;
use qcow2::image::{Image, Preallocation, ResizeOptions, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, Rng, Scheduler, SimDisk, SimIo, Task, crash_states};
use qcow2::storage::{IoSrc, Storage};

/// Watches the disks of one image during one script.
struct Watch<'a> {
    disks: &'a [Arc<SimDisk>; 2],
    start: &'a Start,
    guest: &'a RefCell<Guest>,
    acknowledged: &'a Cell<u64>,
    seen: (u64, u64),
    rng: Rng,
    judge: Judge,
    tally: Tally,
    share: &'a Share<'a>,
}

impl Watch<'_> {
    /// Judges the crash states of this moment, if they or what is promised have changed.
    fn look(&mut self, place: impl Fn() -> String) {
        let changes = self.disks.iter().map(|disk| disk.changes()).sum();
        let now = (changes, self.acknowledged.get());
        if now == self.seen {
            return;
        }
        self.seen = now;
        let guest = self.guest.borrow();
        let (judge, tally, start) = (&mut self.judge, &mut self.tally, self.start);
        let (mut sampling, share) = (Rng::new(self.rng.next_u64()), self.share);
        let both = self.disks.each_ref().map(|disk| &**disk);
        let states = crash_states(both, &mut self.rng, CrashBudget::default(), |files| {
            let sparse = (start.hot_sectors.len() as u64 / 64).max(1);
            let wrong = judge_files(judge, files, &guest, start, (sampling.next_u64() >> 32, sparse));
            let clean = wrong.is_empty();
            tally.add(wrong, &place);
            if clean && sampling.one_in(REOPEN_ONE_IN) {
                tally.reopened += 1;
                tally.add(reopen_files(judge, files, &guest, start, sampling.next_u64()), &place);
            }
            if clean && share.shows_qemu(&mut sampling) {
                share.ask_qemu(judge, files, tally, &place);
            }
        });
        self.tally.states += states;
    }
}

/// One step of a script.
#[derive(Debug, Clone)]
enum Step {
    Write {
        offset: u64,
        length: u64,
        fua: bool,
    },
    /// With the seed of its data.
    Compressed {
        offset: u64,
        length: u64,
        fua: bool,
        seed: u64,
    },
    /// Zeroes, as such or as data in which they are found.
    Zero {
        offset: u64,
        length: u64,
        unmap: bool,
        as_data: bool,
    },
    Discard {
        offset: u64,
        length: u64,
    },
    Flush,
    /// `cancel`: the progress function ends it at its `cancel`th call.
    Resize {
        size: u64,
        mode: Preallocation,
        cancel: Option<u64>,
    },
}

fn overlaps(steps: &[Step], offset: u64, length: u64) -> bool {
    let sectors = |offset: u64, length: u64| offset / 512..(offset + length).div_ceil(512);
    steps.iter().any(|step| match step {
        Step::Write { offset: o, length: l, .. }
        | Step::Compressed { offset: o, length: l, .. }
        | Step::Zero { offset: o, length: l, .. }
        | Step::Discard { offset: o, length: l } => {
            let (a, b) = (sectors(*o, *l), sectors(offset, length));
            a.start < b.end && b.start < a.end
        }
        Step::Flush | Step::Resize { .. } => false,
    })
}

/// Another size, with preallocation where it grows by a little.
fn resize(rng: &mut Rng, start: &Start, old: u64) -> Step {
    let size = start.random_end(rng);
    let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
    let is_small = size > old && size - old <= 40 * start.cluster.min(16 << 10);
    let mode = if is_small { modes[rng.below(4) as usize] } else { Preallocation::Off };
    Step::Resize { size, mode, cancel: rng.one_in(4).then(|| rng.below(3)) }
}

/// Steps that are sent at the same time: one, or two to three writes to different sectors and perhaps a flush.
fn group(rng: &mut Rng, start: &Start, size: u64) -> Vec<Step> {
    if rng.one_in(7) {
        return vec![resize(rng, start, size)];
    }
    let mut steps = Vec::new();
    let wanted = if rng.one_in(3) { 2 + rng.below(2) } else { 1 };
    for _ in 0..wanted {
        if rng.one_in(5) {
            steps.push(Step::Flush);
            continue;
        }
        let align = if rng.one_in(3) { 1 } else { 512 };
        let (offset, length) = start.random_range(rng, align);
        let cut = |(offset, length): (u64, u64)| (offset, length.min(size.saturating_sub(offset)));
        let (offset, length) = cut((offset, length));
        if length == 0 {
            continue;
        }
        let step = match rng.below(10) {
            8.. => {
                let (offset, length) = cut(start.random_clusters(rng));
                if length == 0 || !(offset + length).is_multiple_of(start.cluster) && offset + length != size {
                    continue;
                }
                Step::Compressed { offset, length, fua: rng.one_in(8), seed: rng.next_u64() }
            }
            0 if rng.one_in(4) => match cut(start.last_table()) {
                (_, 0) => continue,
                // As below.
                (offset, length) if !length.is_multiple_of(start.cluster) && offset + length != size => continue,
                (offset, length) if rng.one_in(2) => Step::Discard { offset, length },
                (offset, length) => Step::Zero { offset, length, unmap: rng.one_in(2), as_data: false },
            },
            0 => Step::Zero { offset, length, unmap: rng.one_in(2), as_data: rng.one_in(3) },
            1 => match cut(start.random_cluster(rng)) {
                (_, 0) => continue,
                // Of a disk that ends elsewhere now, half a cluster is not discarded.
                (offset, length) if length < start.cluster && offset + length != size => continue,
                (offset, length) => Step::Discard { offset, length },
            },
            _ => Step::Write { offset, length, fua: rng.one_in(8) },
        };
        let (Step::Write { offset, length, .. }
        | Step::Compressed { offset, length, .. }
        | Step::Zero { offset, length, .. }
        | Step::Discard { offset, length }) = step
        else {
            unreachable!("flushes were made above")
        };
        if !overlaps(&steps, offset, length) {
            steps.push(step);
        }
    }
    steps
}

async fn perform(
    image: &Image,
    io: &SimIo,
    start: &Start,
    guest: &RefCell<Guest>,
    acknowledged: &Cell<u64>,
    op: u64,
    step: Step,
) -> qcow2::Result<()> {
    match step {
        Step::Write { offset, length, fua } | Step::Compressed { offset, length, fua, .. } => {
            let (data, compressed) = match step {
                Step::Compressed { seed, .. } => {
                    (start.data_to_compress(&mut Rng::new(seed), op, offset, length), true)
                }
                _ => (pattern(op, offset, length), false),
            };
            let ticket = guest.borrow_mut().issue(offset, &data);
            let flags = WriteFlags { fua, compressed: compressed && start.data_file.is_none() };
            image.write_with(io, &[IoSrc::from(&data[..])], GuestOffset(offset), flags).await?;
            match fua {
                true => guest.borrow_mut().forced(&ticket),
                false => guest.borrow_mut().complete(&ticket),
            }
        }
        Step::Zero { offset, length, unmap, as_data } => {
            let zeroes = vec![0; length as usize];
            let ticket = guest.borrow_mut().issue(offset, &zeroes);
            let flags = ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() };
            if as_data {
                image.write_with(io, &[IoSrc::from(&zeroes[..])], GuestOffset(offset), WriteFlags::default()).await?;
            } else {
                image.write_zeroes_with(io, GuestOffset(offset), length, flags).await?;
            }
            guest.borrow_mut().complete(&ticket);
        }
        Step::Discard { offset, length } => {
            let ticket = guest.borrow_mut().issue(offset, &vec![0; length as usize]);
            image.discard_with(io, GuestOffset(offset), length).await?;
            guest.borrow_mut().complete(&ticket);
        }
        Step::Flush => {
            let began = guest.borrow().now();
            image.flush_with(io).await?;
            guest.borrow_mut().flushed(began);
        }
        Step::Resize { size, mode, cancel } => {
            let ticket = guest.borrow_mut().issue_end(image.size() / 512, size / 512);
            let calls = Cell::new(0);
            let tell = |_, _| {
                calls.set(calls.get() + 1);
                cancel.is_none_or(|at| calls.get() <= at)
            };
            let options = ResizeOptions { allow_shrink: true, preallocation: mode };
            match image.resize_with(io, size, options, Some(&tell)).await {
                Err(qcow2::Error::Cancelled | qcow2::Error::Unsupported { .. }) => guest.borrow_mut().retract(&ticket),
                result => {
                    result?;
                    guest.borrow_mut().forced(&ticket);
                }
            }
        }
    }
    acknowledged.set(acknowledged.get() + 1);
    Ok(())
}

fn run_script(start: &Start, seed: u64, tally: Tally, share: &Share<'_>) -> Tally {
    let mut rng = Rng::new(seed);
    let disks = disks(start);
    let io = SimIo::new(rng.next_u64(), 1, disks.to_vec());
    let guest = RefCell::new(start.guest());
    let acknowledged = Cell::new(0);
    let mut scheduler = Scheduler::new(rng.next_u64());
    let mut watch = Watch {
        disks: &disks,
        start,
        guest: &guest,
        acknowledged: &acknowledged,
        seen: (0, 0),
        rng: Rng::new(rng.next_u64()),
        judge: Judge::default(),
        tally,
        share,
    };
    let cache = if rng.one_in(3) { 4 * start.cluster.min(4096) } else { 0 };
    let image =
        scheduler.run_one(open_disks(&io, &disks, start, cache), || watch.look(|| format!("seed {seed}, open")));
    let image = image.unwrap().unwrap();
    let mut op = 1;
    for _ in 0..8 + rng.below(8) {
        let steps = group(&mut rng, start, image.size());
        let label = format!("seed {seed}, op {op}: {steps:?}");
        if number("CRASH_TRACE", 0) > 0 {
            println!("{label}");
        }
        let tasks = steps.into_iter().enumerate().map(|(n, step)| {
            Box::pin(perform(&image, &io, start, &guest, &acknowledged, op + n as u64, step)) as Task<'_, _>
        });
        let results = scheduler
            .run(tasks.collect(), || watch.look(|| label.clone()))
            .unwrap_or_else(|stuck| panic!("{label}: {stuck:?}"));
        results.into_iter().for_each(|result: qcow2::Result<()>| result.unwrap_or_else(|why| panic!("{label}: {why}")));
        op += 4;
        if watch.tally.bad() > 0 {
            return watch.tally;
        }
    }
    let began = guest.borrow().now();
    scheduler.run_one(image.close_with(&io), || watch.look(|| format!("seed {seed}, close"))).unwrap().unwrap();
    guest.borrow_mut().flushed(began);
    acknowledged.set(acknowledged.get() + 1);
    watch.look(|| format!("seed {seed}, closed"));
    let end = watch.judge.judge(&disks[0].durable());
    if end.leaks > 0 {
        watch.tally.add(vec![format!("leak: {} clusters after a clean close", end.leaks)], || format!("seed {seed}"));
    }
    if share.shows_qemu_the_end(&mut rng) {
        let [image, data] = disks.each_ref().map(|disk| disk.durable());
        share.ask_qemu(&mut watch.judge, [&image, &data], &mut watch.tally, || format!("seed {seed}, end"));
    }
    watch.tally.leaks += watch.judge.leaking;
    watch.tally.scripts += 1;
    watch.tally
}

fn all_cases() -> impl Iterator<Item = Case> {
    cases().into_iter().chain(data_file_cases())
}

/// The rows of the campaign.
pub fn jobs() -> Vec<Job> {
    let job = |case: Case| Job {
        kind: if case.data_file.is_some() { "data files" } else { "writes" },
        name: case.name.into(),
        weight: 4 * weight(&case),
        run: Box::new(move |share| {
            let start = case.make(share.dir);
            let (mut tally, mut seed) = (Tally::default(), share.seed);
            while share.goes_on(&tally) {
                tally = run_script(&start, seed, tally, share);
                seed += 1;
            }
            tally
        }),
    };
    all_cases().map(job).collect()
}

#[test]
fn the_images_to_start_from_are_sound() {
    let Some(dir) = qemu::dir("crash-start") else { return };
    for case in all_cases() {
        let start = case.make(&dir);
        let wrong = judge_durable(&mut Judge::default(), &disks(&start), &start.guest(), &start);
        assert_eq!(wrong, Vec::<String>::new(), "{}", case.name);
        assert_eq!(Judge::default().judge(&start.image).leaks, 0, "{}", case.name);
        let growing = case.name.contains("about to grow");
        let free = 4096 - (start.image.size / start.cluster).min(4096);
        assert!(!growing || (1..8).contains(&free), "{}: {free} clusters are left in the refcount table", case.name);
    }
}

#[test]
fn the_simulated_disk_is_what_the_engine_writes_to() {
    // The driver recognises its disks by address; if the engine wrapped them, every write would count as completed
    // at once and the crash test would be weaker than it says.
    let Some(dir) = qemu::dir("crash-driver") else { return };
    let start = cases()[0].make(&dir);
    let disk = Arc::new(SimDisk::new(start.image.clone()));
    let io = SimIo::new(1, 0, vec![disk.clone()]);
    let mut scheduler = Scheduler::new(1);
    let image = scheduler.run_one(open(&io, &disk, &start, 0), || {}).unwrap().unwrap();
    let before = io.transfers();
    scheduler
        .run_one(
            image.write_with(
                &io,
                &[IoSrc::from(&[1u8; 512][..])],
                GuestOffset(0),
                WriteFlags { fua: true, ..WriteFlags::default() },
            ),
            || {},
        )
        .unwrap()
        .unwrap();
    assert!(io.transfers() > before + 2, "data, metadata and flushes went through the driver");
    assert!(disk.size().unwrap() > 0);
}
