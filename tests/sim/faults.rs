//! Faults. A seeded script runs once without a fault, and then once for each of its I/O calls and each kind of error:
//! afterwards the image is valid at every crash state (leaks are allowed), nothing is lost that a later flush
//! acknowledged, a failed flush is never forgotten, and the error names the call that failed.
//!
//! `FAULT_SCRIPTS` sets the number of scripts.

use crate::number;
use crate::qemu;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::judge::Judge;
use crate::stage::{
    Case, Guest, Start, cases, data_file_cases, disks, judge_disk, judge_files, open, open_disks, pattern, squeezable,
};
use qcow2::Error;
use qcow2::error::{ErrorCode, IoOp};
use qcow2::format::GuestOffset;
use qcow2::image::{Image, WriteFlags, ZeroFlags};
use qcow2::storage::sim::{CrashBudget, Fault, Rng, SimDisk, crash_states};
use qcow2::storage::{Blocking, IoSrc};

const SCRIPTS_BY_DEFAULT: u64 = 200;

#[derive(Debug, Clone, Copy)]
pub enum Step {
    Write { offset: u64, length: u64, fua: bool },
    Compressed { offset: u64, length: u64, fua: bool },
    Zero { offset: u64, length: u64, unmap: bool },
    Discard { offset: u64, length: u64 },
    Flush,
}

pub fn script(start: &Start, seed: u64) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    (0..12)
        .map(|_| {
            if rng.one_in(4) {
                return Step::Flush;
            }
            if rng.one_in(3) && start.data_file.is_none() {
                let (offset, length) = start.random_clusters(&mut rng);
                return Step::Compressed { offset, length, fua: rng.one_in(8) };
            }
            let (offset, length) = start.random_range(&mut rng, 512);
            if rng.one_in(6) {
                return Step::Zero { offset, length, unmap: rng.one_in(2) };
            }
            if rng.one_in(8) {
                let (offset, length) = if rng.one_in(3) { start.last_table() } else { start.random_cluster(&mut rng) };
                return Step::Discard { offset, length };
            }
            Step::Write { offset, length, fua: rng.one_in(8) }
        })
        .collect()
}

/// What a run under a fault has shown.
pub struct Run {
    /// The image's disk, and that of its external data file.
    pub disks: [Arc<SimDisk>; 2],
    /// Which of them had the fault.
    pub faulty: usize,
    pub guest: Guest,
    /// Errors that calls returned, with the step.
    pub errors: Vec<(String, Error)>,
    /// Steps were under way together: the error that the fault caused need not be the first.
    pub at_once: bool,
    pub closed: bool,
    pub opened: bool,
    pub calls: u64,
}

impl Run {
    pub fn new(start: &Start, faulty: usize, at_once: bool) -> Self {
        let (disks, guest) = (disks(start), start.guest());
        Self { disks, faulty, guest, errors: Vec::new(), at_once, closed: false, opened: false, calls: 0 }
    }

    /// The end of the image: everything is durable, or there is an error.
    pub fn close(&mut self, image: &Image) {
        let began = self.guest.now();
        match image.close() {
            Ok(()) => {
                self.closed = true;
                self.guest.flushed(began);
            }
            Err(why) => self.errors.push(("close".into(), why)),
        }
    }
}

fn step(image: &Image, guest: &mut Guest, op: u64, step: Step) -> Result<(), Error> {
    match step {
        Step::Write { offset, length, fua } | Step::Compressed { offset, length, fua } => {
            let compressed = matches!(step, Step::Compressed { .. });
            let data = if compressed { squeezable(op, offset, length) } else { pattern(op, offset, length) };
            let ticket = guest.issue(offset, &data);
            image.write(&[IoSrc::from(&data[..])], GuestOffset(offset), WriteFlags { fua, compressed })?;
            match fua {
                true => guest.forced(&ticket),
                false => guest.complete(&ticket),
            }
        }
        Step::Zero { offset, length, unmap } => {
            let ticket = guest.issue(offset, &vec![0; length as usize]);
            image.write_zeroes(offset, length, ZeroFlags { may_unmap: unmap, ..ZeroFlags::default() })?;
            guest.complete(&ticket);
        }
        Step::Discard { offset, length } => {
            let ticket = guest.issue(offset, &vec![0; length as usize]);
            image.discard(offset, length)?;
            guest.complete(&ticket);
        }
        Step::Flush => {
            let began = guest.now();
            image.flush()?;
            guest.flushed(began);
        }
    }
    Ok(())
}

/// Runs a script; `faulty` is the disk that a fault is put into.
fn run(start: &Start, steps: &[Step], faulty: usize, fault: Option<Fault>) -> Run {
    let mut run = Run::new(start, faulty, false);
    run.disks[faulty].set_fault(fault);
    match qcow2::wait::block_on(open_disks(&Blocking, &run.disks, start, 2 * start.cluster.min(4096))) {
        Err(why) => run.errors.push(("open".into(), why)),
        Ok(image) => {
            run.opened = true;
            for (op, &what) in steps.iter().chain([&Step::Flush]).enumerate() {
                if let Err(why) = step(&image, &mut run.guest, op as u64 + 1, what) {
                    run.errors.push((format!("step {op}: {what:?}"), why));
                }
            }
            run.close(&image);
        }
    }
    run.calls = run.disks[faulty].calls();
    run
}

/// Whether an error is what must come of a fault that has hit the call `what` at `offset`.
fn names(error: &Error, (what, offset): (&str, u64), fault: Fault) -> bool {
    let named = match what {
        "read" => IoOp::Read,
        "write" => IoOp::Write,
        "flush" => IoOp::Flush,
        _ => IoOp::Truncate,
    };
    match error {
        // Punching and extending ahead is advice, and its failure is nobody's, as is that of a read while freed clusters are given back,
        // which is tried again: the error is that of a later call, as the fault lasted.
        Error::Io { op, errno, .. } if matches!(what, "punch" | "extend") || what == "read" && *op != IoOp::Read => {
            (fault.sticky, *errno) == (true, fault.errno)
        }
        Error::Io { op, errno, offset: at } => {
            (*op, *errno) == (named, fault.errno) && (what == "flush" || *at == offset)
        }
        _ => false,
    }
}

/// Everything that must hold after a run.
pub fn check(start: &Start, run: &Run, fault: Fault, label: &str) {
    let mut judge = Judge::default();
    let both = run.disks.each_ref().map(|disk| &**disk);
    crash_states(both, &mut Rng::new(fault.index), CrashBudget { singles: 6, random: 4 }, |files| {
        let wrong = judge_files(&mut judge, files, &run.guest, start, (0, 1));
        assert!(wrong.is_empty(), "{label}: {wrong:#?}\nerrors: {:#?}", run.errors);
    });
    let Some((what, offset)) = run.disks[run.faulty].fault_hit() else { return };
    if run.errors.is_empty() {
        // Best effort (giving space back at the end) or done again: then everything is there, as was just judged.
        assert_ne!(what, "flush", "{label}: a failed flush was not reported");
        assert!(run.closed, "{label}");
        return;
    }
    let first = if run.at_once { run.errors.len() } else { 1 };
    let is_named = run.errors[..first].iter().any(|(_, error)| names(error, (what, offset), fault));
    assert!(is_named, "{label}: {what} at 0x{offset:x} failed, and the errors are {:#?}", run.errors);
    if what == "flush" {
        let last = &run.errors[run.errors.len() - 1];
        assert!(!run.closed, "{label}: close succeeded after a failed flush");
        let poisoned = last.1.code() == ErrorCode::Poisoned || run.errors.len() == 1;
        assert!(poisoned, "{label}: a failed flush is sticky, and the last error is {} ({})", last.1, last.0);
    }
    if run.closed {
        let leaks = judge.judge(&run.disks[0].durable()).leaks;
        assert_eq!(leaks, 0, "{label}: leaks after a successful close; errors: {:#?}", run.errors);
    }
}

#[test]
fn every_failing_call_leaves_a_valid_image() {
    let Some(dir) = qemu::dir("faults") else { return };
    let cases: Vec<Case> = cases().into_iter().chain(data_file_cases()).collect();
    let starts: Vec<(&str, Start)> = cases.iter().map(|case| (case.name, case.make(&dir))).collect();
    let scripts = number("FAULT_SCRIPTS", SCRIPTS_BY_DEFAULT).div_ceil(starts.len() as u64);
    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, start) in &starts {
        for seed in 1..=scripts {
            let steps = script(start, seed);
            let calls = [0, 1].map(|disk| (0..run(start, &steps, disk, None).calls).map(move |index| (disk, index)));
            for (disk, index) in calls.into_iter().flatten() {
                for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                    let fault = Fault { index, errno, sticky };
                    let run = run(start, &steps, disk, Some(fault));
                    check(start, &run, fault, &format!("{name}, seed {seed}, {fault:?} of disk {disk}"));
                    let kind = run.disks[disk].fault_hit().map_or("not reached", |(what, _)| what);
                    *outcomes.entry(kind).or_default() += 1;
                }
            }
        }
    }
    println!("{} scripts, runs by the call that failed: {outcomes:?}", scripts * starts.len() as u64);
    for kind in ["read", "write", "flush"] {
        assert!(outcomes.contains_key(kind), "no {kind} failed in any run");
    }
}

#[test]
fn a_full_disk_that_is_emptied_again_takes_writes_again() {
    let Some(dir) = qemu::dir("faults-full") else { return };
    for case in cases() {
        let start = case.make(&dir);
        let disk = Arc::new(SimDisk::new(start.image.clone()));
        let image = qcow2::wait::block_on(open(&Blocking, &disk, &start, 0)).unwrap();
        let mut guest = start.guest();
        disk.set_fault(Some(Fault { index: disk.calls(), errno: libc::ENOSPC, sticky: true }));
        let fresh = start.hot[6] * start.cluster;
        let failed = step(&image, &mut guest, 1, Step::Write { offset: fresh, length: 512, fua: true });
        assert_eq!(failed.unwrap_err().errno(), libc::ENOSPC, "{}", case.name);
        disk.set_fault(None);
        step(&image, &mut guest, 2, Step::Write { offset: fresh, length: 512, fua: false }).unwrap();
        step(&image, &mut guest, 3, Step::Flush).unwrap();
        image.close().unwrap();
        let mut judge = Judge::default();
        assert_eq!(judge_disk(&mut judge, &disk.durable(), &guest, &start), Vec::<String>::new(), "{}", case.name);
        assert_eq!(judge.judge(&disk.durable()).leaks, 0, "{}: what was reserved was not given back", case.name);
    }
}
