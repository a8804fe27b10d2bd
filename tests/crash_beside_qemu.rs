//! One judge for two programs: the same scripts of changes without a flush, done by QEMU under its `blklogwrites` driver
//! and by the library under its recorder. Both logs are in the format of dm-log-writes; every crash state that they allow
//! is judged. Sectors that the script left alone must read what they read before, the others that or something that was
//! issued. What QEMU loses is printed; the library may lose nothing.

#[path = "judge/mod.rs"]
mod judge;
#[path = "qemu/mod.rs"]
mod qemu;
#[path = "stage/mod.rs"]
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::sync::Arc;

use judge::Judge;
use qcow2::image::{Image, ZeroFlags};
use qcow2::storage::memory::MemoryStorage;
use qcow2::storage::record::Recorder;
use qcow2::storage::sim::{CrashBudget, Rng, SimDisk};
use qcow2::storage::{Blocking, IoSrc, Storage};
use qcow2::wait::block_on;
use stage::{Case, Guest, Start, cases, judge_disk, options};

const SCRIPTS: u64 = 12;
const STEPS: u64 = 6;

/// What was judged, and how often each rule was broken.
#[derive(Default)]
struct Tally {
    states: u64,
    broken: BTreeMap<String, u64>,
    first: Vec<String>,
}

impl Tally {
    fn add(&mut self, wrong: Vec<String>, place: impl Fn() -> String) {
        for what in wrong {
            *self.broken.entry(what[..2].to_owned()).or_default() += 1;
            if self.first.len() < 8 {
                self.first.push(format!("{}: {what}", place()));
            }
        }
    }
}

/// A change, as a command of qemu-io: its name and flags, a byte, and the range.
struct Step {
    command: &'static str,
    byte: u8,
    offset: u64,
    length: u64,
}

fn script(start: &Start, seed: u64) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    let step = |n: u64| {
        let ((offset, length), whole) = (start.random_range(&mut rng, 512), start.random_cluster(&mut rng));
        let is_whole = whole.1 == start.cluster;
        let (command, (offset, length)) = match rng.below(7) {
            0 if is_whole => ("discard", whole),
            1 => ("write -z -u", (offset, length)),
            _ => ("write", (offset, length)),
        };
        let byte = if command.starts_with("write -z") || command == "discard" { 0 } else { 100 + n as u8 };
        Step { command, byte, offset, length }
    };
    (0..STEPS).map(step).collect()
}

/// What a guest may read at any time: what was there, and everything that the script issues.
fn oracle(start: &Start, steps: &[Step]) -> Guest {
    let mut guest = start.guest();
    for step in steps {
        guest.issue(step.offset, &vec![step.byte; step.length as usize]);
    }
    guest
}

/// QEMU's log of a script; `None`, and loud, where it cannot make one.
fn log_of_qemu(dir: &qemu::Dir, start: &Start, steps: &[Step]) -> Option<Vec<u8>> {
    let (image, log) = (dir.path("recorded.qcow2"), dir.path("recorded.log"));
    fs::write(&image, start.image.to_file()).unwrap();
    fs::File::create(&log).unwrap().set_len(64 << 20).unwrap();
    let file = |name: &str| format!(r#"{{"driver":"file","filename":"{name}"}}"#);
    let recorded = format!(
        r#"json:{{"driver":"qcow2","discard":"unmap","file":{{"driver":"blklogwrites","log-sector-size":512,"file":{},"log":{}}}}}"#,
        file(&image),
        file(&log)
    );
    let mut command = Command::new("qemu-io");
    for step in steps {
        let pattern = if step.byte == 0 { String::new() } else { format!("-P {}", step.byte) };
        let Step { command: name, offset, length, .. } = step;
        command.args(["-c", &format!("{name} -q {pattern} {offset} {length}")]);
    }
    let out = command.arg(recorded).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    if said.contains("Unknown driver") {
        assert!(std::env::var_os("CI").is_none(), "qemu-io without blklogwrites under CI");
        eprintln!("SKIPPED: this qemu-io has no blklogwrites driver");
        return None;
    }
    assert!(out.status.success() && !said.contains("rror"), "{said}");
    Some(fs::read(&log).unwrap())
}

/// The library's log of the same.
fn log_of_ours(start: &Start, steps: &[Step]) -> Vec<u8> {
    let log = Arc::new(MemoryStorage::default());
    let disk: Arc<dyn Storage> = Arc::new(SimDisk::new(start.image.clone()));
    let recorder = Arc::new(Recorder::new(disk, log.clone()).unwrap());
    let image = block_on(Image::open_with(&Blocking, recorder, &options(start, 0))).unwrap();
    for step in steps {
        let data = vec![step.byte; step.length as usize];
        match step.command {
            "discard" => image.discard(step.offset, step.length).unwrap(),
            "write -z -u" => {
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                image.write_zeroes(step.offset, step.length, flags).unwrap();
            }
            _ => image.pwrite(&data, step.offset).unwrap(),
        }
    }
    image.close().unwrap();
    drop(image);
    log.snapshot()
}

/// Replays a log on a simulated disk, and judges what a crash may leave after each entry.
fn judge_log(log: &[u8], start: &Start, guest: &Guest, tally: &mut Tally, label: &str) {
    let field = |at: usize, index: usize| u64::from_le_bytes(log[at + index * 8..][..8].try_into().unwrap());
    assert_eq!((field(0, 0), field(0, 1)), (0x6a_7366_7773_6872, 1), "{label}: no log");
    let mut image = start.image.clone();
    image.size += 8 << 20; // a log does not say how long the file is
    let disk = SimDisk::new(image);
    let (mut at, mut judge, mut rng) = (512, Judge::default(), Rng::new(1));
    for entry in 0..field(0, 2) {
        let (offset, length, flags) = (field(at, 0) * 512, field(at, 1) * 512, field(at, 2));
        at += 512;
        if flags & 4 != 0 {
            disk.punch_hole(offset, length).unwrap();
        } else if length > 0 {
            disk.write(&[IoSrc::from(&log[at..at + length as usize])], offset).unwrap();
            at += length as usize;
        }
        if flags & 3 != 0 {
            disk.flush().unwrap();
        }
        tally.states += disk.crash_states(&mut rng, CrashBudget::default(), |image| {
            tally.add(judge_disk(&mut judge, image, guest, start), || format!("{label}, entry {entry}"));
        });
    }
}

#[test]
fn one_judge_for_what_qemu_records_and_what_we_record() {
    let Some(dir) = qemu::dir("recorded") else { return };
    let (mut theirs, mut ours) = (Tally::default(), Tally::default());
    let chosen = ["4 KiB", "4 KiB, snapshot, compressed", "64 KiB, compressed", "16 KiB, extended, snapshot"];
    let is_chosen = |case: &Case| chosen.contains(&case.name);
    for case in cases().into_iter().filter(is_chosen) {
        let start = case.make(&dir);
        for seed in 1..=SCRIPTS {
            let steps = script(&start, seed);
            let guest = oracle(&start, &steps);
            let label = format!("{}, script {seed}", case.name);
            let Some(log) = log_of_qemu(&dir, &start, &steps) else { return };
            judge_log(&log, &start, &guest, &mut theirs, &label);
            judge_log(&log_of_ours(&start, &steps), &start, &guest, &mut ours, &label);
        }
    }
    for (name, tally) in [("QEMU", &theirs), ("the library", &ours)] {
        println!("{name}: {} states, broken rules: {:?}", tally.states, tally.broken);
        tally.first.iter().for_each(|what| println!("    {what}"));
    }
    assert!(ours.broken.is_empty(), "{:#?}", ours.first);
    assert!(ours.states > 1000 && theirs.states > 1000);
}
