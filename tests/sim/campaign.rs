//! The crash campaign: every kind of crash test for its share of the states, on all cores, and one table at the end.
//!
//! `CRASH_STATES` sets how many states are judged in all (`make crash CRASH_STATES=100000000` for a long run), and
//! `CRASH_SECONDS` after how long no script is begun any more; `CRASH_SEED` sets the first seed; `CRASH_CASE` takes only
//! rows whose name contains it; `CRASH_QEMU` shows one state in so many to `qemu-img check` as well, and one in
//! a 300th of that many of those that scripts end in. `CRASH_ROWS=all` prints a row for each image. `CRASH_SCRIPTS=all` runs all short scripts rather than a sample.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::judge::Judge;
use crate::stage::{Case, write_sparse};
use crate::{alphabet, bitmap_crash, check_crash, crash, create_crash, number, qemu, snapshot_crash};
use qcow2::storage::sim::{DiskImage, Rng};

const STATES_BY_DEFAULT: u64 = 300_000;
const QEMU_ONE_IN: u64 = 20_000;
/// One state in this many is opened again.
pub const REOPEN_ONE_IN: u64 = 100;

/// What was looked at, and what was found.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    pub scripts: u64,
    pub states: u64,
    pub reopened: u64,
    /// States that were shown to qemu-img.
    pub qemu: u64,
    /// States with clusters that are counted and not used: allowed.
    pub leaks: u64,
    stable_lost: u64,
    neither_old_nor_new: u64,
    low_refcounts: u64,
    copied: u64,
    structure: u64,
    after_reopen: u64,
    qemu_differs: u64,
    pub messages: Vec<String>,
    seconds: f64,
}

impl Tally {
    /// Adds what is wrong with a state. `place` says where it was met, with its seed.
    pub fn add(&mut self, wrong: Vec<String>, place: impl Fn() -> String) {
        for what in wrong {
            let counter = match &what[..2] {
                "D7" => &mut self.stable_lost,
                "D8" => &mut self.neither_old_nor_new,
                "D3" => &mut self.low_refcounts,
                "D4" => &mut self.copied,
                "qe" => &mut self.qemu_differs,
                "re" | "af" => &mut self.after_reopen,
                _ => &mut self.structure,
            };
            *counter += 1;
            if self.messages.len() < 4 {
                self.messages.push(format!("{}: {what}", place()));
            }
        }
    }

    /// How much was found.
    pub fn bad(&self) -> u64 {
        self.findings().iter().sum()
    }

    fn findings(&self) -> [u64; 7] {
        let tables = [self.low_refcounts, self.copied, self.structure];
        let content = [self.stable_lost, self.neither_old_nor_new];
        [content[0], content[1], tables[0], tables[1], tables[2], self.after_reopen, self.qemu_differs]
    }

    fn join(&mut self, other: &Self) {
        self.scripts += other.scripts;
        self.states += other.states;
        self.reopened += other.reopened;
        self.qemu += other.qemu;
        self.leaks += other.leaks;
        self.stable_lost += other.stable_lost;
        self.neither_old_nor_new += other.neither_old_nor_new;
        self.low_refcounts += other.low_refcounts;
        self.copied += other.copied;
        self.structure += other.structure;
        self.after_reopen += other.after_reopen;
        self.qemu_differs += other.qemu_differs;
        self.seconds += other.seconds;
    }
}

/// How many states an image gets beside others: those with large clusters, or with many, take several times as long.
pub fn weight(case: &Case) -> u64 {
    match case.cluster_bits {
        _ if case.prefill_kib > 0 => 1,
        9 => 60,
        12 => 30,
        14 => 12,
        _ => 1,
    }
}

/// What one row of the table is about.
pub struct Job {
    pub kind: &'static str,
    pub name: String,
    /// Its share of all states.
    pub weight: u64,
    pub run: Box<dyn Fn(&Share<'_>) -> Tally + Send + Sync>,
}

/// How much a job has to do.
pub struct Share<'a> {
    pub dir: &'a qemu::Dir,
    states: u64,
    pub seed: u64,
    end: Option<Instant>,
    qemu_one_in: u64,
}

impl Share<'_> {
    /// Whether another script is wanted.
    pub fn goes_on(&self, tally: &Tally) -> bool {
        tally.states < self.states && tally.bad() == 0 && self.end.is_none_or(|end| Instant::now() < end)
    }

    /// Whether this state is one for qemu-img.
    pub fn shows_qemu(&self, rng: &mut Rng) -> bool {
        self.qemu_one_in > 0 && rng.one_in(self.qemu_one_in)
    }

    /// Whether this end of a script is one for qemu-img.
    pub fn shows_qemu_the_end(&self, rng: &mut Rng) -> bool {
        self.qemu_one_in > 0 && rng.one_in((self.qemu_one_in / 300).max(1))
    }

    /// Shows a state to `qemu-img check`, which must find the leaks that the judge finds, and nothing else.
    pub fn ask_qemu(&self, judge: &mut Judge, files: [&DiskImage; 2], tally: &mut Tally, place: impl Fn() -> String) {
        tally.qemu += 1;
        let path = self.dir.path("state.qcow2");
        write_sparse(&path, files[0]);
        if files[1].size > 0 {
            write_sparse(&self.dir.path("start.data"), files[1]);
        }
        // It does not look at counts past the end of the file.
        let leaks = judge.judge(files[0]).leaks_inside;
        let found = qemu::errors_and_leaks(&path);
        if found != Ok((0, leaks)) {
            tally.add(vec![format!("qemu-img finds {found:?} (errors, leaks), the judge 0 and {leaks}")], place);
        }
    }
}

fn all_jobs() -> Vec<Job> {
    let wanted = std::env::var("CRASH_CASE").unwrap_or_default();
    let jobs = [
        crash::jobs(),
        snapshot_crash::jobs(),
        bitmap_crash::jobs(),
        alphabet::jobs(),
        check_crash::jobs(),
        create_crash::jobs(),
    ];
    jobs.into_iter().flatten().filter(|job| format!("{}: {}", job.kind, job.name).contains(&wanted)).collect()
}

#[test]
fn no_crash_state_is_damaged() {
    if qemu::dir("crash").is_none() {
        return;
    }
    let jobs = all_jobs();
    assert!(!jobs.is_empty(), "no row has such a name");
    let states = number("CRASH_STATES", STATES_BY_DEFAULT);
    let weights: u64 = jobs.iter().map(|job| job.weight).sum();
    let began = Instant::now();
    let end = std::env::var("CRASH_SECONDS").ok().map(|_| began + Duration::from_secs(number("CRASH_SECONDS", 0)));
    let next = AtomicUsize::new(0);
    let tallies = Mutex::new(vec![Tally::default(); jobs.len()]);
    let work = |worker: usize| {
        let dir = qemu::dir(&format!("crash-{worker}")).unwrap();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return };
            let share = Share {
                dir: &dir,
                states: (states * job.weight).div_ceil(weights),
                seed: number("CRASH_SEED", 1),
                end,
                qemu_one_in: number("CRASH_QEMU", QEMU_ONE_IN),
            };
            let began = Instant::now();
            let mut tally = (job.run)(&share);
            tally.seconds = began.elapsed().as_secs_f64();
            tallies.lock().unwrap()[index] = tally;
        }
    };
    std::thread::scope(|scope| {
        for worker in 0..std::thread::available_parallelism().map_or(2, |n| n.get()) {
            let work = &work;
            std::thread::Builder::new()
                .name(format!("crash-{worker}"))
                .spawn_scoped(scope, move || work(worker))
                .unwrap();
        }
    });
    report(&jobs, &tallies.into_inner().unwrap(), began.elapsed());
}

/// One row: what was looked at, and what was found.
pub fn line(name: &str, t: &Tally) {
    let found = t.findings().map(|n| format!("{n:>9}")).join(" ");
    println!("{name:<54} {:>7} {:>10} {:>8} {:>6} {:>9} {found}", t.scripts, t.states, t.reopened, t.qemu, t.leaks);
}

/// The head of a table of [`line`]s.
pub fn heading(what: &str) {
    println!(
        "{:<54} {:>7} {:>10} {:>8} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        what,
        "scripts",
        "states",
        "reopened",
        "qemu",
        "leaking",
        "lost",
        "garbage",
        "low count",
        "COPIED",
        "structure",
        "reopen",
        "qemu diff"
    );
}

fn report(jobs: &[Job], tallies: &[Tally], took: Duration) {
    heading("");
    let is_long = std::env::var_os("CRASH_ROWS").is_some();
    let (mut all, mut kinds): (Tally, Vec<(&str, Tally)>) = Default::default();
    let mut bad = Vec::new();
    for (job, tally) in jobs.iter().zip(tallies) {
        let name = format!("{}: {}", job.kind, job.name);
        if is_long {
            line(&name, tally);
        }
        match kinds.last_mut().filter(|(kind, _)| *kind == job.kind) {
            Some((_, sum)) => sum.join(tally),
            None => kinds.push((job.kind, tally.clone())),
        }
        all.join(tally);
        bad.extend(tally.messages.iter().map(|message| {
            let seed = message.split(|c: char| !c.is_ascii_digit()).find(|n| !n.is_empty()).unwrap_or("1");
            format!("{name}: {message}\n  again: make crash CRASH_CASE='{name}' CRASH_SEED={seed} CRASH_STATES=1")
        }));
    }
    for (kind, sum) in &kinds {
        line(&format!("{kind}, all"), sum);
        if std::env::var_os("CRASH_SPEED").is_some() {
            println!("{:.0} states a second and core", sum.states as f64 / sum.seconds);
        }
    }
    line("everything", &all);
    let (seconds, share) = (took.as_secs_f64(), all.states / all.qemu.max(1));
    println!("{} crash states in {seconds:.0} s, of which one in {share} was shown to qemu-img as well", all.states);
    assert!(bad.is_empty(), "crash states with damage:\n{}", bad.join("\n"));
    let unjudged: Vec<&str> =
        jobs.iter().zip(tallies).filter(|(_, tally)| tally.states == 0).map(|(job, _)| &job.name[..]).collect();
    assert!(unjudged.is_empty() || std::env::var_os("CRASH_SECONDS").is_some(), "not judged: {unjudged:?}");
}
