//! D15: power cuts during a repair. Damaged images are repaired on a simulated disk; every state that a crash may leave
//! is judged by a second reader of the format: no rule is broken that was not broken before, and the guest (and each
//! snapshot) reads what it read. A sample is repaired again, which ends where the first repair would have.

#[path = "../check_repair/images.rs"]
mod images;

use crate::campaign::{Job, Share, Tally};
use crate::pass_on::pass_on;
use crate::qemu;
use std::collections::BTreeSet;
use std::fs;
use std::sync::{Arc, Mutex};

use crate::judge::{Judge, Layout};
use qcow2::image::check::{CheckOptions, CheckResult, Repair, check_with};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::sim::{CrashBudget, DiskImage, Fault, Rng, SimDisk};
use qcow2::storage::{Blocking, Storage};
use qcow2::wait::block_on;
use qcow2::{Error, OpenOptions};

/// One state in this many is repaired again.
const REPAIR_ONE_IN: u64 = 7;

fn repair(storage: Arc<dyn Storage>) -> qcow2::Result<CheckResult> {
    repair_as(storage, Repair::All)
}

fn repair_as(storage: Arc<dyn Storage>, repair: Repair) -> qcow2::Result<CheckResult> {
    let mut options = CheckOptions { repair, memory_bytes: 1 << 20, ..CheckOptions::default() };
    block_on(check_with(&Blocking, storage, "image", &OpenOptions::default(), &mut options))
}

/// The rules that an image breaks, each with its place, but without the counts that a repair changes on its way.
fn broken(image: &DiskImage) -> BTreeSet<String> {
    let verdict = Judge::default().judge(image);
    verdict.violations.iter().map(|what| what.split(" has ").next().unwrap().to_owned()).collect()
}

type Content = Vec<Option<[u8; 512]>>;

/// What each sector of each tree reads; `None` where the backing file shows, or nothing that can be read.
fn content(image: &DiskImage) -> Content {
    let layout = Layout::parse(image).unwrap();
    let mut all = Vec::new();
    for tree in 0..layout.trees.len() {
        for sector in 0..layout.trees[tree].guest_size / 512 {
            let mut found = [0; 512];
            let read = layout.read(tree, sector, &mut found);
            all.push(matches!(read, Ok(Some(()))).then_some(found));
        }
    }
    all
}

/// A disk whose crash states are all judged after each call.
struct Watched {
    disk: SimDisk,
    broken: BTreeSet<String>,
    content: Content,
    /// Corruptions that a whole repair leaves.
    left: u64,
    name: String,
    seen: Mutex<(u64, u64)>, // states, and those repaired again
    wrong: Mutex<Vec<String>>,
    seed: u64,
}

impl Watched {
    fn look(&self) {
        let mut seen = self.seen.lock().unwrap();
        let mut rng = Rng::new(seen.0 + self.seed);
        self.disk.crash_states(&mut rng, CrashBudget::default(), |image| {
            seen.0 += 1;
            let now = broken(image);
            let new: Vec<_> = now.difference(&self.broken).collect();
            if !new.is_empty() {
                self.wrong.lock().unwrap().extend(new.into_iter().cloned());
            }
            let kept = content(image).iter().zip(&self.content).all(|(now, before)| before.is_none() || now == before);
            if !kept {
                self.wrong.lock().unwrap().push(format!("D7: state {}: the guest reads something else", seen.0));
            }
            if seen.0.is_multiple_of(REPAIR_ONE_IN) {
                seen.1 += 1;
                let again = Arc::new(MemoryStorage::new(image.to_file()));
                let result = repair(again.clone()).unwrap();
                let (what, found) = (&self.name, (result.corruptions, result.leaks, result.check_errors));
                assert_eq!(found, (self.left, 0, 0), "{what}, state {}: {result:?}", seen.0);
                let before = again.snapshot();
                repair(again.clone()).unwrap();
                assert_eq!(again.snapshot(), before, "{what}, state {}: a third repair has written", seen.0);
            }
        });
    }
}

impl Storage for Watched {
    pass_on!(disk: read size);
    pass_on!(disk: write flush truncate, then look);
}

/// The row of the campaign.
pub fn jobs() -> Vec<Job> {
    let run = |share: &Share<'_>| {
        let (mut tally, mut round) = (Tally::default(), 0);
        // All of them at least once.
        while round == 0 || share.goes_on(&tally) {
            all_repairs(share, share.seed + round, &mut tally);
            round += 1;
        }
        tally
    };
    vec![Job { kind: "repair", name: "nothing is worse than before".into(), weight: 10, run: Box::new(run) }]
}

fn all_repairs(share: &Share<'_>, seed: u64, tally: &mut Tally) {
    let before = tally.clone();
    // The judge reads 64 KiB clusters too slowly to look at that many states.
    let is_judged = |recipe: &images::Recipe| recipe.cluster < 16384 && !recipe.options.contains("data_file");
    for recipe in images::recipes().into_iter().filter(is_judged) {
        let sound = fs::read(images::make(share.dir, &recipe)).unwrap();
        for damage in images::damages(&sound, &recipe) {
            // What the judge cannot even find its way through: tables that lie nowhere.
            let is_lost = damage.name.starts_with("refcount table") || damage.name.contains("block is not aligned");
            if is_lost || damage.name.contains("block past") || damage.name.contains("L1 entry past") {
                continue;
            }
            let bytes = images::damaged(&sound, &damage);
            let whole = Arc::new(MemoryStorage::new(bytes.clone()));
            let left = repair(whole).unwrap().corruptions;
            let start = DiskImage::new(bytes);
            let watched = Arc::new(Watched {
                broken: broken(&start),
                content: content(&start),
                disk: SimDisk::new(start),
                left,
                name: format!("{}: {}", recipe.name, damage.name),
                seen: Mutex::default(),
                wrong: Mutex::default(),
                seed,
            });
            let result = repair(watched.clone()).unwrap();
            assert_eq!(result.corruptions, left, "{}", watched.name);
            assert_eq!(
                watched.disk.current().to_file(),
                watched.disk.durable().to_file(),
                "{}: not durable",
                watched.name
            );
            let seen = *watched.seen.lock().unwrap();
            tally.scripts += 1;
            tally.states += seen.0;
            tally.reopened += seen.1;
            let wrong = std::mem::take(&mut *watched.wrong.lock().unwrap());
            tally.add(wrong, || format!("seed {seed}, {}", watched.name));
        }
    }
    let (cases, states) = (tally.scripts - before.scripts, tally.states - before.states);
    let again = tally.reopened - before.reopened;
    assert!(cases > 150 && states > 3000 && again > 300, "{cases} {states} {again}");
}

/// Each call of a repair fails in turn: nothing is worse than it was, the error is told, and the next repair ends where an
/// undisturbed one does.
#[test]
fn a_repair_that_fails_makes_nothing_worse_and_can_be_done_again() {
    let Some(dir) = qemu::dir("repair-faults") else { return };
    let (mut rng, mut runs) = (Rng::new(1), 0);
    let is_judged = |recipe: &images::Recipe| recipe.cluster < 16384 && !recipe.options.contains("data_file");
    for recipe in images::recipes().into_iter().filter(is_judged) {
        let sound = fs::read(images::make(&dir, &recipe)).unwrap();
        for damage in images::damages(&sound, &recipe) {
            let is_lost = damage.name.starts_with("refcount table") || damage.name.contains("block is not aligned");
            let is_past = damage.name.contains("block past") || damage.name.contains("L1 entry past");
            if is_lost || is_past || !rng.one_in(6) {
                continue;
            }
            let start = DiskImage::new(images::damaged(&sound, &damage));
            for kind in [Repair::All, Repair::Leaks] {
                let whole = Arc::new(SimDisk::new(start.clone()));
                let left = repair_as(whole.clone(), kind).unwrap();
                for index in (0..whole.calls()).filter(|_| rng.one_in(1 + whole.calls() / 8)) {
                    for (errno, sticky) in [(libc::EIO, false), (libc::ENOSPC, true)] {
                        let fault = Fault { index, errno, sticky };
                        let label = format!("{}: {}, {kind:?}, {fault:?}", recipe.name, damage.name);
                        repair_under(&start, kind, fault, &left, &label);
                        runs += 1;
                    }
                }
            }
        }
    }
    assert!(runs > 200, "{runs}");
}

fn repair_under(start: &DiskImage, kind: Repair, fault: Fault, left: &CheckResult, label: &str) {
    let (before, kept) = (broken(start), content(start));
    let disk = Arc::new(SimDisk::new(start.clone()));
    disk.set_fault(Some(fault));
    let result = repair_as(disk.clone(), kind);
    match (&result, disk.fault_hit()) {
        (_, None) => return,
        (Ok(result), Some(hit)) => assert!(result.check_errors > 0 || hit.0 == "punch", "{label}: {hit:?}, {result:?}"),
        (Err(Error::Io { errno, .. }), _) => assert_eq!(*errno, fault.errno, "{label}"),
        (Err(other), Some(hit)) => panic!("{label}: {hit:?} failed, and the error is {other}"),
    }
    disk.crash_states(&mut Rng::new(fault.index), CrashBudget { singles: 4, random: 3 }, |image| {
        let now = broken(image);
        let new: Vec<_> = now.difference(&before).collect();
        assert!(new.is_empty(), "{label}: worse than before: {new:?}");
        let same = content(image).iter().zip(&kept).all(|(now, before)| before.is_none() || now == before);
        assert!(same, "{label}: the guest reads something else");
    });
    let again = Arc::new(SimDisk::new(disk.durable()));
    let found = repair_as(again, kind).unwrap_or_else(|e| panic!("{label}: again: {e}"));
    let facts = |result: &CheckResult| (result.corruptions, result.leaks, result.check_errors);
    assert_eq!(facts(&found), facts(left), "{label}: repaired again");
}
