//! Short scripts, one after another: every sequence of three of forty steps on two clusters, and so every sequence of
//! one and of two, which are their beginnings. They are run and judged as those of snapshots are. A seeded sample, or
//! with `CRASH_SCRIPTS=all` all 64,000 on every kind of image.

use crate::campaign::{Job, Tally, weight};
use crate::judge::Judge;
use crate::snapshot_crash::{Step, run_script};
use crate::stage::{Case, Start, cases};
use qcow2::image::Preallocation;
use qcow2::storage::sim::Rng;

const LETTERS: usize = 40;
const SCRIPTS: u64 = 64_000;

/// The images that they run on: each stands for what the others have as well.
const CASES: [&str; 6] = [
    "512 B, 64-bit refcounts",
    "512 B, compressed, backing",
    "4 KiB",
    "4 KiB, snapshot, compressed",
    "16 KiB, extended, backing",
    "16 KiB, extended, snapshot",
];

/// The steps. `a` and `b` are clusters beside each other, `c` is one of another L2 table.
fn letters(start: &Start) -> Vec<Step> {
    let cluster = start.cluster;
    let unit = if start.extended { cluster / 32 } else { cluster };
    let [a, b, c] = [start.hot[0], start.hot[1], start.hot[4]].map(|index| index * cluster);
    let write = |offset: u64, length: u64| Step::Write { offset, length, fua: false };
    let mut letters = Vec::new();
    // Head, middle, tail and all of a subcluster (a cluster, without subclusters: then at odd bytes) and of a cluster.
    let odd = if start.extended { 0 } else { 7 };
    for (at, size, odd) in [(a + cluster / 4 / unit * unit, unit, odd), (a, cluster, 0), (b, cluster, 0)] {
        letters.push(write(at, size / 2 + odd));
        letters.push(write(at + size / 4 + odd, size / 2));
        letters.push(write(at + size / 2 + odd, size / 2 - odd));
        letters.push(write(at, size));
    }
    letters.extend([write(a, 2 * cluster), write(c, cluster), write(c + cluster / 4, cluster / 4)]);
    letters.push(Step::Write { offset: a + cluster / 2, length: cluster / 4, fua: true });
    for unmap in [false, true] {
        for (offset, length) in [(a + cluster / 4 / unit * unit, unit), (a, cluster), (b, cluster), (a, 2 * cluster)] {
            letters.push(Step::Zero { offset, length, unmap });
        }
        letters.push(Step::Zero { offset: a + cluster / 2, length: cluster, unmap });
    }
    for (offset, length) in [(a, cluster), (b, cluster), (a, 2 * cluster)] {
        letters.push(Step::Discard { offset, length });
        letters.push(Step::Compress { offset, length });
    }
    letters.extend([Step::Flush, Step::Create, Step::Apply(0), Step::Delete(0), Step::Bitmap]);
    // The disk ends in a cluster that is written to, in one that is not there yet, and where it did.
    letters.push(Step::Resize((a + cluster / 2).next_multiple_of(512), Preallocation::Off));
    letters.push(Step::Resize(start.guest_size + 2 * cluster, Preallocation::Metadata));
    letters.push(Step::Resize(start.guest_size, Preallocation::Off));
    assert_eq!(letters.len(), LETTERS);
    letters
}

/// The rows of the campaign.
pub fn jobs() -> Vec<Job> {
    let job = |case: Case| Job {
        kind: "short scripts",
        name: case.name.into(),
        weight: 4 * weight(&case),
        run: Box::new(move |share| {
            let is_all = std::env::var("CRASH_SCRIPTS").is_ok_and(|which| which == "all");
            let start = case.make(share.dir);
            let letters = letters(&start);
            let (mut tally, mut judge, mut seed) = (Tally::default(), Judge::default(), share.seed);
            while if is_all { tally.scripts < SCRIPTS && tally.bad() == 0 } else { share.goes_on(&tally) } {
                // A seed is a script, and what of it the disk keeps.
                let number = if is_all { tally.scripts } else { Rng::new(seed).below(SCRIPTS) } as usize;
                let script = [number / LETTERS / LETTERS, number / LETTERS % LETTERS, number % LETTERS];
                let steps = |_: &mut Rng| script.map(|letter| letters[letter]).to_vec();
                let label = format!("{seed}, script {number}");
                run_script((&case, &start), (seed, &label), steps, &mut judge, (share, &mut tally));
                seed += 1;
            }
            tally.leaks = judge.leaking;
            tally
        }),
    };
    let chosen = |case: &Case| CASES.contains(&case.name);
    cases().into_iter().filter(chosen).map(job).collect()
}
