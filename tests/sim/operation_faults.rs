//! Operations that hold the image alone, each with every call of the storage failing in turn: another size with every
//! preallocation, snapshots, bitmaps. After the error the image is what it was before the operation or what it is after
//! it, at every crash state; the error names the call; and once the fault is gone the same handle can do it, unless
//! a flush has failed. Nothing is leaked then.
//!
//! `OPERATION_FAULT_RUNS` bounds the number of runs.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::judge::Judge;
use crate::stage::{
    Case, Operation, World, cases, data_file_cases, disks, open_disks, pattern, reopen_files, squeezable,
};
use crate::{number, qemu};
use qcow2::Error;
use qcow2::error::{ErrorCode, IoOp};
use qcow2::format::GuestOffset;
use qcow2::image::{Image, Preallocation, WriteFlags};
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, SimDisk, crash_states};
use qcow2::storage::{Blocking, IoSrc};
use qcow2::wait::block_on;

const RUNS_BY_DEFAULT: u64 = 4_000;

fn open(disks: &[Arc<SimDisk>; 2], world: &World) -> Image {
    block_on(open_disks(&Blocking, disks, &world.start, 4 * world.start.cluster.min(4096))).unwrap()
}

pub fn write(image: &Image, world: &mut World, op: u64, (offset, length): (u64, u64), compressed: bool) {
    let length = length.min(world.size.saturating_sub(offset));
    if length == 0 {
        return;
    }
    let data = if compressed { squeezable(op, offset, length) } else { pattern(op, offset, length) };
    let ticket = world.issue(offset, &data);
    let flags = WriteFlags { compressed, ..WriteFlags::default() };
    image.write(&[IoSrc::from(&data[..])], GuestOffset(offset), flags).unwrap();
    world.guest.complete(&ticket);
}

/// An image with bitmaps and a snapshot, as far as it can have them, and entries of all kinds.
pub fn prepare(case: &Case, dir: &qemu::Dir) -> World {
    let start = case.make(dir);
    let mut world = World::new(&start);
    let disks = disks(&start);
    let image = open(&disks, &world);
    let mut operations = Vec::new();
    if start.is_v3() {
        for (name, granularity, disabled) in [("b0", 4096, false), ("b1", 512, true)] {
            operations.push(Operation::Add { name: name.into(), granularity, disabled });
        }
    }
    let is_narrow = ["refcount_bits=1", "refcount_bits=2"].iter().any(|option| case.options.starts_with(option));
    if start.data_file.is_none() && !is_narrow {
        operations.push(Operation::Create);
    }
    let mut rng = Rng::new(1);
    for operation in operations {
        write(&image, &mut world, 70, start.random_range(&mut rng, 512), false);
        if start.data_file.is_none() {
            write(&image, &mut world, 71, start.random_cluster(&mut rng), true);
        }
        block_on(operation.perform(&image, &Blocking)).unwrap_or_else(|e| panic!("{}, {operation:?}: {e}", case.name));
        world = world.after(&operation);
    }
    write(&image, &mut world, 72, start.random_cluster(&mut rng), false);
    image.close().unwrap();
    [world.start.image, world.start.data] = disks.each_ref().map(|disk| disk.durable());
    world.guest = world.start.guest();
    let wrong = world.judge(&mut Judge::default(), [&world.start.image, &world.start.data], (0, 1), true);
    assert_eq!(wrong, Vec::<String>::new(), "{}", case.name);
    world
}

/// The operations that an image of this kind can have.
fn operations(world: &World) -> Vec<Operation> {
    let (start, cluster) = (&world.start, world.start.cluster);
    let mut operations = Vec::new();
    if start.is_v3() || start.snapshots.is_empty() {
        for mode in [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let size = start.guest_size + 3 * cluster + 512;
            operations.push(Operation::Resize { size, mode });
        }
        let covers = cluster / if start.extended { 16 } else { 8 } * cluster;
        let ends = [start.hot[1] * cluster + 512, start.hot[4] * cluster, covers, 512];
        let far = if cluster == 512 { covers * 70 } else { covers * 3 };
        for size in ends.into_iter().chain([far]) {
            operations.push(Operation::Resize { size, mode: Preallocation::Off });
        }
    }
    if !start.snapshots.is_empty() {
        operations.extend([Operation::Create, Operation::Apply(0), Operation::Delete(0)]);
    } else if start.data_file.is_none() {
        operations.push(Operation::Create);
    }
    if start.is_v3() {
        let (b0, b1) = ("b0".to_owned(), "b1".to_owned());
        operations.extend([
            Operation::Add { name: "b2".into(), granularity: 0, disabled: false },
            Operation::Remove(b0.clone()),
            Operation::Clear(b0.clone()),
            Operation::Enable(b0.clone(), false),
            Operation::Enable(b1.clone(), true),
            Operation::Merge(b1, b0),
        ]);
    }
    operations
}

/// One run: where the fault is, and whether the operation is tried again.
#[derive(Debug, Clone, Copy)]
struct Plan {
    disk: usize,
    fault: Option<Fault>,
    tries_again: bool,
}

fn named(what: &str) -> IoOp {
    match what {
        "read" => IoOp::Read,
        "write" => IoOp::Write,
        "flush" => IoOp::Flush,
        _ => IoOp::Truncate,
    }
}

fn check_error(error: &Error, hit: (&'static str, u64), fault: Fault, label: &str) {
    match error {
        // What is tried again, or is advice, fails with a later call if the fault lasts.
        Error::Io { op, errno, .. } if *op != named(hit.0) => {
            assert_eq!((fault.sticky, *errno), (true, fault.errno), "{label}: {error}")
        }
        Error::Io { errno, offset, .. } => {
            assert_eq!(*errno, fault.errno, "{label}: {error}");
            assert!(hit.0 == "flush" || fault.sticky || *offset == hit.1, "{label}: 0x{:x} failed: {error}", hit.1);
        }
        // Refused for another reason (narrow refcounts, say).
        other => panic!("{label}: {} at 0x{:x} failed, and the error is {other}", hit.0, hit.1),
    }
}

/// Runs an operation; returns the calls of each disk that it took, or why it is refused without any fault.
fn run(name: &str, world: &World, operation: &Operation, plan: Plan) -> Result<[u64; 2], Error> {
    let label = format!("{name}, {operation:?}, {plan:?}");
    let (mut old, disks) = (world.clone(), disks(&world.start));
    let image = open(&disks, world);
    let mut rng = Rng::new(7);
    // Acknowledged, and not durable yet.
    for op in 1..4 {
        write(&image, &mut old, op, world.start.random_range(&mut rng, 512), false);
    }
    let new = old.after(operation);
    let before = disks.each_ref().map(|disk| disk.calls());
    let fault = plan.fault.map(|fault| Fault { index: fault.index + before[plan.disk], ..fault });
    disks[plan.disk].set_fault(fault);
    let result = block_on(operation.perform(&image, &Blocking));
    let calls = [0, 1].map(|disk| disks[disk].calls() - before[disk]);
    let Some(fault) = fault else { return result.map(|()| calls) };
    let Some(hit) = disks[plan.disk].fault_hit() else { return Ok(calls) };
    disks[plan.disk].set_fault(None);
    let candidates = if result.is_ok() { vec![&new] } else { vec![&old, &new] };
    let found = judge_crash_states(&disks, &candidates, fault.index, &label);
    if let Err(error) = &result {
        check_error(error, hit, fault, &label);
    }
    if matches!(image.flush(), Err(e) if e.code() == ErrorCode::Poisoned) {
        // A failed flush, or a root of which nobody knows whether it was switched.
        let is_stuck = hit.0 == "flush" || fault.sticky || result.is_err();
        assert!(is_stuck, "{label}: no flush has failed, and the handle writes no more");
        assert!(image.close().is_err(), "{label}: closed, although a flush failed");
        let files = disks.each_ref().map(|disk| disk.durable());
        let wrong =
            reopen_files(&mut Judge::default(), [&files[0], &files[1]], &found.guest, &found.start, fault.index);
        assert!(wrong.is_empty(), "{label}: {wrong:#?}");
        return Ok(calls);
    }
    assert_ne!(hit.0, "flush", "{label}: a failed flush is forgotten");
    let is_resize = matches!(operation, Operation::Resize { .. });
    assert!(result.is_ok() || is_resize || old.is_shown_by(&image), "{label}: {result:?}, and it has happened");
    let mut now = if result.is_ok() || !old.is_shown_by(&image) { new.clone() } else { old };
    assert!(now.is_shown_by(&image), "{label}: neither the old nor the new: {result:?}");
    if result.is_err() && plan.tries_again && !(is_resize && now.size == new.size) {
        block_on(operation.perform(&image, &Blocking)).unwrap_or_else(|e| panic!("{label}: tried again: {e}"));
        now = new;
    }
    let offset = world.start.hot[0] * world.start.cluster;
    write(&image, &mut now, 9, (offset, 512), false);
    image.close().unwrap_or_else(|e| panic!("{label}: close: {e}"));
    now.guest.flushed(now.guest.now());
    let files = disks.each_ref().map(|disk| disk.durable());
    let mut judge = Judge::default();
    let wrong = now.judge(&mut judge, [&files[0], &files[1]], (0, 1), true);
    assert!(wrong.is_empty(), "{label}: {result:?}, closed: {wrong:#?}");
    assert_eq!(judge.judge(&files[0]).leaks, 0, "{label}: {result:?}: leaks after a successful close");
    Ok(calls)
}

/// Each crash state is one of the worlds. Returns the one that what is durable shows.
fn judge_crash_states<'a>(disks: &[Arc<SimDisk>; 2], worlds: &[&'a World], seed: u64, label: &str) -> &'a World {
    let mut judge = Judge::default();
    let mut which = |files: [&DiskImage; 2]| {
        let wrong: Vec<_> = worlds.iter().map(|world| world.judge(&mut judge, files, (0, 1), false)).collect();
        let found = wrong.iter().position(Vec::is_empty);
        found.unwrap_or_else(|| panic!("{label}: neither the old nor the new state: {wrong:#?}"))
    };
    let both = disks.each_ref().map(|disk| &**disk);
    crash_states(both, &mut Rng::new(seed), CrashBudget { singles: 4, random: 3 }, |files| {
        which(files);
    });
    let [image, data] = disks.each_ref().map(|disk| disk.durable());
    worlds[which([&image, &data])]
}

/// The ways in which a call fails.
fn plans(disk: usize, index: u64) -> [Plan; 3] {
    [(libc::EIO, false, true), (libc::EIO, false, false), (libc::ENOSPC, true, true)]
        .map(|(errno, sticky, tries_again)| Plan { disk, fault: Some(Fault { index, errno, sticky }), tries_again })
}

/// One operation on one image, with each `step`th of its calls failing.
fn every_call(case: &str, operation: impl Fn(&World) -> Operation, step: usize) {
    let Some(dir) = qemu::dir(&format!("fault-{}", case.replace([' ', ','], "-"))) else { return };
    let case = cases().into_iter().chain(data_file_cases()).find(|known| known.name == case).unwrap();
    let world = prepare(&case, &dir);
    let operation = operation(&world);
    let calls = run(case.name, &world, &operation, Plan { disk: 0, fault: None, tries_again: false }).unwrap();
    let all = [0, 1].map(|disk| (0..calls[disk]).map(move |index| (disk, index)));
    for (disk, index) in all.into_iter().flatten().step_by(step) {
        for plan in plans(disk, index) {
            run(case.name, &world, &operation, plan).unwrap();
        }
    }
}

fn larger(world: &World) -> Operation {
    Operation::Resize { size: world.size + 5 * world.start.cluster, mode: Preallocation::Metadata }
}

/// Once the new size was in force, an error of a write to the bitmaps gave all of them up for good, and another one in a
/// row ended writing through the handle. Now they follow later, at close at the latest, and until then they are marked.
#[test]
fn bitmaps_that_cannot_follow_a_resize_at_once_follow_later() {
    every_call("4 KiB", larger, 1);
    every_call("512 B, data file", larger, 1);
}

/// When a table could not be read after the disk had become smaller, it and all the tables behind it were leaked.
#[test]
fn a_table_that_cannot_be_read_when_a_disk_shrinks_is_given_back_later() {
    every_call("512 B, 1-bit refcounts", |_| Operation::Resize { size: 512, mode: Preallocation::Off }, 1);
}

/// A write that clears the COPIED flags of an L2 table fails half way, and the snapshot is tried again. What was read back
/// had no flags any more, so that nothing was written, and a crash brought the flags back to a table with two owners.
#[test]
fn flags_that_a_failed_write_has_cleared_are_cleared_again() {
    every_call("4 KiB, snapshot, compressed", |_| Operation::Create, 1);
}

/// Taking back what was counted for a snapshot that fails ended at the first error, and the rest was leaked.
#[test]
fn what_was_counted_for_a_snapshot_that_fails_is_taken_back() {
    every_call("512 B, 64-bit, table about to grow", |_| Operation::Create, 11);
}

#[test]
fn every_failing_call_of_an_operation_leaves_the_old_state_or_the_new() {
    let Some(dir) = qemu::dir("operation-faults") else { return };
    let wanted = std::env::var("CRASH_CASE").unwrap_or_default();
    let cases: Vec<Case> = cases().into_iter().chain(data_file_cases()).filter(|c| c.name.contains(&wanted)).collect();
    let budget = number("OPERATION_FAULT_RUNS", RUNS_BY_DEFAULT) / cases.len() as u64;
    let mut rng = Rng::new(number("CRASH_SEED", 1));
    let mut runs: BTreeMap<String, u64> = BTreeMap::new();
    for case in &cases {
        let world = prepare(case, &dir);
        let operations = operations(&world);
        for operation in &operations {
            let plain = Plan { disk: 0, fault: None, tries_again: false };
            let calls = match run(case.name, &world, operation, plain) {
                Ok(calls) => calls,
                Err(Error::TooLarge { .. } | Error::Unsupported { .. }) => continue,
                Err(e) => panic!("{}, {operation:?}: {e}", case.name),
            };
            // A state of an image with many clusters takes several times as long to judge.
            let weight = if case.prefill_kib > 0 || case.cluster_bits == 16 { 8 } else { 1 };
            let share = (budget / operations.len() as u64 / 3 / weight).max(1);
            let all = [0, 1].map(|disk| (0..calls[disk]).map(move |index| (disk, index)));
            let rare = ((calls[0] + calls[1]) / share).max(1);
            for (disk, index) in all.into_iter().flatten().filter(|_| rng.one_in(rare)) {
                for plan in plans(disk, index) {
                    run(case.name, &world, operation, plan).unwrap();
                    let kind = format!("{operation:?}");
                    *runs.entry(kind.split([' ', '(']).next().unwrap().into()).or_default() += 1;
                }
            }
        }
    }
    println!("runs by operation: {runs:?}");
    let kinds = ["Resize", "Create", "Apply", "Delete", "Add", "Remove", "Clear", "Enable", "Merge"];
    assert!(!wanted.is_empty() || kinds.iter().all(|kind| runs.contains_key(*kind)), "{runs:?}");
}
