//! Crashes in the middle of operations that hold the image alone, between writes: other sizes, snapshots and bitmaps in
//! random order. Each disk that a power cut may leave is what the image was before the operation or what it is after it,
//! with every snapshot, and each bitmap is marked in use or covers what was changed (D1 to D10, D14).
//!
//! `CRASH_STATES`, `CRASH_SEED` and `CRASH_CASE` as for the tests of writes.

use std::cell::RefCell;

use crate::judge::Judge;
use crate::operation_faults::{prepare, write};
use crate::stage::{Case, Operation, World, cases, data_file_cases, disks, open_disks, reopen_files};
use crate::{number, qemu};
use qcow2::Error;
use qcow2::storage::Blocking;
use qcow2::storage::sim::{CrashBudget, Rng, Scheduler, SimIo, crash_states};
use qcow2::wait::block_on;

const STATES_BY_DEFAULT: u64 = 25_000;
const REOPEN_ONE_IN: u64 = 60;

/// One image, a few operations; returns how many states were judged.
fn script(name: &str, start: &World, seed: u64) -> u64 {
    let mut rng = Rng::new(seed);
    let disks = disks(&start.start);
    let io = SimIo::new(rng.next_u64(), 1, disks.to_vec());
    let cache = if rng.one_in(3) { 4 * start.start.cluster.min(4096) } else { 0 };
    let image = block_on(open_disks(&Blocking, &disks, &start.start, cache)).unwrap();
    let mut world = start.clone();
    let (mut judge, mut choosing, mut states) = (Judge::default(), Rng::new(rng.next_u64()), 0);
    for op in 0..5 {
        for n in 0..rng.below(4) {
            let compressed = rng.one_in(4) && start.start.data_file.is_none() && world.size == start.size;
            let range = match compressed {
                true => start.start.random_cluster(&mut rng),
                false => start.start.random_range(&mut rng, 512),
            };
            write(&image, &mut world, op * 10 + n + 1, range, compressed);
        }
        let operation = Operation::random(&mut rng, &world);
        let label = format!("{name}, seed {seed}, op {op}: {operation:?}");
        let worlds = RefCell::new(vec![world.clone(), world.after(&operation)]);
        let mut seen = 0;
        let mut look = |again: bool| {
            let changes = disks.iter().map(|disk| disk.changes()).sum();
            if std::mem::replace(&mut seen, changes) == changes && !again {
                return;
            }
            let (both, sampling) = (disks.each_ref().map(|disk| &**disk), choosing.next_u64());
            let mut sampling = Rng::new(sampling);
            states += crash_states(both, &mut choosing, CrashBudget { singles: 5, random: 4 }, |files| {
                let worlds = worlds.borrow();
                let mut wrong = Vec::new();
                let found = worlds.iter().find(|world| {
                    let what = world.judge(&mut judge, files, (0, 1), false);
                    wrong.extend(what.iter().cloned());
                    what.is_empty()
                });
                let Some(found) = found else { panic!("{label}: neither the old nor the new: {wrong:#?}") };
                if sampling.one_in(REOPEN_ONE_IN) {
                    let wrong = reopen_files(&mut judge, files, &found.guest, &found.start, sampling.next_u64());
                    assert!(wrong.is_empty(), "{label}: {wrong:#?}");
                }
            });
        };
        let done = Scheduler::new(rng.next_u64()).run_one(operation.perform(&image, &io), || look(false)).unwrap();
        match done {
            Ok(()) => drop(worlds.borrow_mut().remove(0)),
            Err(Error::TooLarge { .. } | Error::Unsupported { .. } | Error::Bitmap { .. }) => {
                worlds.borrow_mut().truncate(1);
            }
            Err(e) => panic!("{label}: {e}"),
        }
        look(true);
        world = worlds.into_inner().remove(0);
        assert!(world.is_shown_by(&image), "{label}");
    }
    image.close().unwrap();
    world.guest.flushed(world.guest.now());
    let files = disks.each_ref().map(|disk| disk.durable());
    let wrong = world.judge(&mut judge, [&files[0], &files[1]], (0, 1), true);
    assert!(wrong.is_empty(), "{name}, seed {seed}, closed: {wrong:#?}");
    assert_eq!(judge.judge(&files[0]).leaks, 0, "{name}, seed {seed}: leaks");
    states
}

#[test]
fn a_crash_during_an_operation_leaves_the_old_state_or_the_new() {
    let Some(dir) = qemu::dir("operation-crash") else { return };
    let wanted = std::env::var("CRASH_CASE").unwrap_or_default();
    let is_wanted = |case: &Case| case.name.contains(&wanted) && case.prefill_kib == 0;
    let cases: Vec<Case> = cases().into_iter().chain(data_file_cases()).filter(is_wanted).collect();
    let share = number("CRASH_STATES", STATES_BY_DEFAULT) / cases.len() as u64;
    for case in &cases {
        let start = prepare(case, &dir);
        let (mut states, mut seed) = (0, number("CRASH_SEED", 1));
        // A state of an image with large clusters takes several times as long to judge.
        while states < share / if case.cluster_bits == 16 { 8 } else { 1 } {
            states += script(case.name, &start, seed);
            seed += 1;
        }
        println!("{:<40} {states:>8} states", case.name);
    }
}
