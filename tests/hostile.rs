//! Damage: every single bit, and every metadata word at boundary values, of images that hold every structure the
//! engine reads. Whatever the image says, the engine neither panics nor hangs, asks for no absurd memory, writes
//! nothing to an image that it refuses, marks corruption that it finds, and leaves guest data alone that the damaged
//! structure does not describe.

#[path = "hostile/attempt.rs"]
mod attempt;
#[path = "hostile/damage.rs"]
mod damage;
#[path = "hostile/features.rs"]
mod features;
#[path = "hostile/fixture.rs"]
mod fixture;
#[path = "hostile/guarded.rs"]
mod guarded;
mod judge;
mod qemu;
#[path = "hostile/repair.rs"]
mod repair;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use damage::{Damage, Site, damages, sites};
use fixture::{Fixture, Recipe};
use guarded::Heap;

#[global_allocator]
static HEAP: Heap = Heap;

/// Bytes that one case may hold at once. The largest image has 400 KiB; a damaged header may claim clusters of 2 MiB,
/// and a write then needs a new L2 table, a refcount block and a cluster of that size.
const HEAP_MAX: usize = 24 << 20;

/// What became of the cases of one image.
#[derive(Default)]
struct Tally {
    cases: usize,
    outcomes: std::collections::BTreeMap<&'static str, usize>,
    failures: Vec<String>,
}

impl Tally {
    /// Runs one case; a panic, too much memory and a broken rule are failures alike.
    fn run(&mut self, what: impl Fn() -> String, case: impl FnOnce() -> Result<&'static str, String>) {
        self.cases += 1;
        let before = Heap::start();
        let outcome = catch_unwind(AssertUnwindSafe(case));
        let peak = Heap::peak_since(before);
        let failure = match outcome {
            Ok(Ok(_)) if peak > HEAP_MAX => format!("held {peak} bytes of memory"),
            Ok(Ok(kind)) => {
                *self.outcomes.entry(kind).or_default() += 1;
                return;
            }
            Ok(Err(why)) => why,
            Err(panic) => format!("PANIC: {}", text_of(&*panic)),
        };
        self.failures.push(format!("{}: {failure}", what()));
    }

    fn report(self, name: &str, started: Instant) {
        println!("{name:28} {:6} cases in {:.1?}: {:?}", self.cases, started.elapsed(), self.outcomes);
        let shown: Vec<_> = self.failures.iter().take(12).map(String::as_str).collect();
        assert!(shown.is_empty(), "{name}: {} failures, first:\n{}", self.failures.len(), shown.join("\n"));
        assert!(self.cases > 1000, "{name}: only {} cases", self.cases);
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?")
}

/// Damages the image itself.
fn damage_the_image(recipe: &Recipe) {
    let Some(dir) = qemu::dir(&format!("hostile-{}", recipe.name)) else { return };
    let fixture = Fixture::make(&dir, recipe);
    let started = Instant::now();
    let mut tally = Tally::default();
    for_each_damage(&fixture, |site, damage| {
        tally.run(|| format!("{site:?} {damage:?}"), || attempt::on_image(&fixture, site, damage));
    });
    let mut repairs = Tally::default();
    for_each_damage(&fixture, |site, damage| {
        repairs.run(|| format!("repair: {site:?} {damage:?}"), || repair::on_image(&fixture, site, damage));
    });
    repairs.report(&format!("{}, repaired", recipe.name), started);
    let found = tally.outcomes.iter().filter(|(kind, _)| kind.contains("corrupt")).map(|(_, n)| n).sum::<usize>();
    assert!(found > 100, "hardly any damage was found: {:?}", tally.outcomes);
    tally.report(recipe.name, started);
}

fn for_each_damage(fixture: &Fixture, mut each: impl FnMut(&Site, Damage)) {
    for site in sites(fixture) {
        for damage in damages(fixture, &site) {
            each(&site, damage);
        }
    }
}

#[test]
fn small_standard_clusters_with_a_snapshot() {
    damage_the_image(&Recipe {
        name: "std-512-snapshot",
        options: "cluster_size=512",
        cluster: 512,
        clusters: 150,
        snapshot: true,
        ..Recipe::default()
    });
}

#[test]
fn version_2() {
    let options = "compat=0.10,cluster_size=4k";
    damage_the_image(&Recipe { name: "v2-4k-snapshot", options, snapshot: true, zero: false, ..Recipe::default() });
}

#[test]
fn zstd_and_narrow_refcounts() {
    let options = "cluster_size=4k,refcount_bits=4,compression_type=zstd";
    damage_the_image(&Recipe { name: "std-4k-zstd-refcount4", options, snapshot: true, ..Recipe::default() });
}

#[test]
fn extended_entries_over_a_raw_backing_file() {
    damage_the_image(&Recipe {
        name: "ext-16k-zstd-raw-backing",
        options: "cluster_size=16k,extended_l2=on,compression_type=zstd,refcount_bits=8",
        cluster: 16384,
        clusters: 10,
        backing: Some("raw"),
        ..Recipe::default()
    });
}

#[test]
fn extended_entries_with_a_snapshot_and_wide_refcounts() {
    damage_the_image(&Recipe {
        name: "ext-16k-snapshot-refcount64",
        options: "cluster_size=16k,extended_l2=on,refcount_bits=64",
        cluster: 16384,
        clusters: 10,
        snapshot: true,
        ..Recipe::default()
    });
}

#[test]
fn bitmaps_and_an_external_data_file() {
    for with_data_file in [false, true] {
        let name = if with_data_file { "bitmaps-data-file" } else { "bitmaps" };
        let Some(dir) = qemu::dir(&format!("hostile-{name}")) else { return };
        let (fixture, data) = features::make(&dir, with_data_file);
        let (started, mut tally) = (Instant::now(), Tally::default());
        for site in features::sites(&fixture) {
            for damage in damages(&fixture, &site) {
                let case = || features::on_image(&fixture, data.as_deref(), &site, damage);
                tally.run(|| format!("{site:?} {damage:?}"), case);
            }
        }
        assert!(tally.outcomes.len() == 3, "{:?}", tally.outcomes);
        tally.report(name, started);
    }
}

#[test]
fn a_damaged_backing_file_is_not_the_overlays_fault() {
    for extended in [false, true] {
        let recipe = Recipe {
            name: if extended { "backing-ext-16k" } else { "backing-std-4k-zstd" },
            options: if extended { "cluster_size=16k,extended_l2=on" } else { "cluster_size=4k,compression_type=zstd" },
            cluster: if extended { 16384 } else { 4096 },
            ..Recipe::default()
        };
        let Some(dir) = qemu::dir(&format!("hostile-{}", recipe.name)) else { return };
        let base = Fixture::make(&dir, &recipe);
        let overlay = Fixture::overlay_of(&dir, &base);
        let started = Instant::now();
        let mut tally = Tally::default();
        for_each_damage(&base, |site, damage| {
            tally.run(|| format!("{site:?} {damage:?}"), || attempt::on_backing(&overlay, &base, site, damage));
        });
        tally.report(recipe.name, started);
    }
}
