//! Which disks a crash may leave behind: one disk, or several that lose power together.

use super::Rng;
use super::disk::{Effect, SECTOR_BYTES, SimDisk, State, What};
use super::image::DiskImage;

/// Up to this many effects, all subsets of them are tried.
const EXHAUSTIVE: usize = 6;

/// How many crash states of one moment are looked at, beyond "all", "none" and the newest effects.
#[derive(Debug, Clone, Copy)]
pub struct CrashBudget {
    /// Effects that are tried alone and missing (the newest ones first, then random ones).
    pub singles: usize,
    /// Random subsets of whole effects, and as many random subsets of sectors.
    pub random: usize,
}

impl Default for CrashBudget {
    fn default() -> Self {
        Self { singles: 12, random: 8 }
    }
}

/// The part of the effects that a crash kept: one flag for each sector of each write, one for each change of the size.
struct Kept {
    flags: Vec<bool>,
    /// First flag of each effect, and the end.
    starts: Vec<usize>,
}

impl Kept {
    fn new(log: &[(usize, &Effect)]) -> Self {
        let mut starts = vec![0];
        for (_, effect) in log {
            let units = match &effect.what {
                What::Write { gone, .. } => gone.len(),
                What::Truncate { .. } | What::Extend { .. } => 1,
            };
            starts.push(starts[starts.len() - 1] + units);
        }
        Self { flags: vec![false; starts[starts.len() - 1]], starts }
    }

    fn fill(&mut self, keep: bool) {
        self.flags.fill(keep);
    }

    fn set(&mut self, effect: usize, keep: bool) {
        self.flags[self.starts[effect]..self.starts[effect + 1]].fill(keep);
    }
}

/// Builds one crash state of a disk after another in place, going back to the durable contents in between.
struct Builder<'a> {
    durable: &'a DiskImage,
    image: DiskImage,
    /// First sector and number of those that differ from the durable contents.
    touched: Vec<(usize, usize)>,
    truncated: bool,
}

impl<'a> Builder<'a> {
    fn new(durable: &'a DiskImage) -> Self {
        Self { durable, image: durable.clone(), touched: Vec::new(), truncated: false }
    }

    /// Adds what was kept of an effect.
    fn add(&mut self, effect: &Effect, kept: &[bool]) {
        match &effect.what {
            What::Truncate { size } if kept[0] => {
                self.truncated = true;
                self.image.truncate(*size);
            }
            What::Extend { size } if kept[0] => self.image.size = self.image.size.max(*size),
            What::Truncate { .. } | What::Extend { .. } => {}
            What::Write { first_sector, content, end, gone } => {
                // A run of sectors that were all kept at a time.
                let is_kept = |i: &usize| kept[*i] && !gone[*i];
                let mut at = 0;
                while let Some(from) = (at..kept.len()).find(is_kept) {
                    at = (from..kept.len()).find(|i| !is_kept(i)).unwrap_or(kept.len());
                    let sectors = &content[from * SECTOR_BYTES..at * SECTOR_BYTES];
                    self.image.put_sectors(first_sector + from, sectors, *end);
                    self.touched.push((first_sector + from, at - from));
                }
            }
        }
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.truncated) {
            self.image.clone_from(self.durable);
            self.touched.clear();
            return;
        }
        self.image.shorten_to(self.durable);
        for (first, sectors) in self.touched.drain(..) {
            self.image.restore(self.durable, first, sectors);
        }
    }
}

impl SimDisk {
    /// Shows `judge` disks that a crash at this moment may leave behind: all effects, none, each alone, each missing,
    /// all subsets of up to 6, random subsets, and writes torn between sectors. Returns how many. `judge` must not
    /// use this disk.
    pub fn crash_states(&self, rng: &mut Rng, budget: CrashBudget, mut judge: impl FnMut(&DiskImage)) -> u64 {
        crash_states([self], rng, budget, |[image]| judge(image))
    }
}

/// As [`SimDisk::crash_states`], for disks that lose power together: what is kept of one says nothing about another.
pub fn crash_states<const N: usize>(
    disks: [&SimDisk; N],
    rng: &mut Rng,
    budget: CrashBudget,
    mut judge: impl FnMut([&DiskImage; N]),
) -> u64 {
    let states = disks.map(SimDisk::lock);
    let states: [&State; N] = std::array::from_fn(|n| &*states[n]);
    // Of all disks, in the order in which they were done.
    let mut log: Vec<(usize, &Effect)> = Vec::new();
    for (disk, state) in states.iter().enumerate() {
        log.extend(state.log.iter().map(|effect| (disk, effect)));
    }
    log.sort_by_key(|(_, effect)| effect.id);
    let mut builders = states.map(|state| Builder::new(&state.durable));
    let mut kept = Kept::new(&log);
    let mut count = 0;
    let mut show = |kept: &Kept| {
        builders.iter_mut().for_each(Builder::reset);
        for (index, &(disk, effect)) in log.iter().enumerate() {
            builders[disk].add(effect, &kept.flags[kept.starts[index]..kept.starts[index + 1]]);
        }
        judge(builders.each_ref().map(|builder| &builder.image));
        count += 1;
    };
    show(&kept);
    if log.is_empty() {
        return count;
    }
    kept.fill(true);
    show(&kept);
    if log.len() <= EXHAUSTIVE {
        for subset in 1..(1u32 << log.len()) - 1 {
            (0..log.len()).for_each(|effect| kept.set(effect, subset >> effect & 1 == 1));
            show(&kept);
        }
    } else {
        for n in 0..log.len().min(budget.singles) {
            let effect = if n < 2 { log.len() - 1 - n } else { rng.below(log.len() as u64) as usize };
            for alone in [false, true] {
                kept.fill(!alone);
                kept.set(effect, alone);
                show(&kept);
            }
        }
        for _ in 0..budget.random {
            let odds = 1 + rng.below(5); // of 6
            (0..log.len()).for_each(|effect| kept.set(effect, rng.below(6) < odds));
            show(&kept);
        }
    }
    if kept.flags.len() > log.len() {
        torn(rng, budget, &mut kept, &mut show);
    }
    count
}

/// States in which writes are torn between sectors: the newest one cut at a random place, and random sectors of all.
fn torn(rng: &mut Rng, budget: CrashBudget, kept: &mut Kept, show: &mut impl FnMut(&Kept)) {
    let newest = kept.starts[kept.starts.len() - 2]..kept.flags.len();
    if newest.len() > 1 {
        for others in [false, true] {
            let cut = newest.start + 1 + rng.below(newest.len() as u64 - 1) as usize;
            kept.fill(others);
            kept.flags[newest.start..cut].fill(true);
            kept.flags[cut..].fill(false);
            show(kept);
            kept.flags[newest.clone()].iter_mut().for_each(|keep| *keep = !*keep);
            show(kept);
        }
    }
    for _ in 0..budget.random {
        let odds = 1 + rng.below(9); // of 10
        kept.flags.iter_mut().for_each(|keep| *keep = rng.below(10) < odds);
        show(kept);
    }
}
