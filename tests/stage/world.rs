//! What is known about an image as a whole: what the guest reads, what its snapshots hold, what its bitmaps have to cover;
//! and the operations that change it as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use qcow2::image::{BitmapOptions, Image, Preallocation, ResizeOptions, SnapshotFacts};
use qcow2::storage::Io;
use qcow2::storage::sim::{DiskImage, Rng, SECTOR_BYTES};

use super::{Guest, PAST_THE_END, Start, Ticket, judge_files};
use crate::judge::{self, Judge, Layout};

/// An operation that holds the image alone.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    Resize {
        size: u64,
        mode: Preallocation,
    },
    Create,
    /// The snapshot with this index.
    Apply(usize),
    Delete(usize),
    Add {
        name: String,
        granularity: u64,
        disabled: bool,
    },
    Remove(String),
    Clear(String),
    Enable(String, bool),
    /// What the second says is added to the first.
    Merge(String, String),
}

/// What a bitmap has to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Tracked {
    pub enabled: bool,
    pub granularity: u64,
    /// Sectors that have to be dirty.
    pub covers: BTreeSet<u64>,
}

/// What an image may be.
#[derive(Clone)]
pub struct World {
    pub guest: Guest,
    /// With what the snapshots hold.
    pub start: Start,
    pub size: u64,
    pub snapshot_sizes: Vec<u64>,
    pub bitmaps: BTreeMap<String, Tracked>,
}

impl Operation {
    /// Does it.
    pub async fn perform<I: Io>(&self, image: &Image, io: &I) -> qcow2::Result<()> {
        let id_of = async |index: usize| {
            let list = image.snapshots_with(io).await?;
            Ok::<_, qcow2::Error>(String::from_utf8(list[index].id.clone()).unwrap())
        };
        match self {
            Self::Resize { size, mode } => {
                let options = ResizeOptions { allow_shrink: true, preallocation: *mode };
                image.resize_with(io, *size, options, None).await
            }
            Self::Create => {
                let facts = SnapshotFacts { date: Some((1, 0)), ..SnapshotFacts::default() };
                image.snapshot_create_with(io, "taken", &facts).await.map(|_| ())
            }
            Self::Apply(index) => image.snapshot_apply_with(io, &id_of(*index).await?).await,
            Self::Delete(index) => image.snapshot_delete_with(io, &id_of(*index).await?, None).await,
            Self::Add { name, granularity, disabled } => {
                let options = BitmapOptions { granularity_bytes: *granularity, disabled: *disabled };
                image.bitmap_add_with(io, name, options).await
            }
            Self::Remove(name) => image.bitmap_remove_with(io, name).await,
            Self::Clear(name) => image.bitmap_clear_with(io, name).await,
            Self::Enable(name, on) => image.bitmap_enable_with(io, name, *on).await,
            Self::Merge(to, from) => image.bitmap_merge_with(io, to, None, from).await,
        }
    }

    /// One that can be done in this world.
    pub fn random(rng: &mut Rng, world: &World) -> Self {
        let start = &world.start;
        let snapshots = start.snapshots.len() as u64;
        match rng.below(if start.is_v3() { 4 } else { 2 }) {
            0 if start.is_v3() || snapshots == 0 => {
                let size = start.random_end(rng).max(SECTOR_BYTES as u64);
                let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                let is_small = size > world.size && size - world.size <= 40 * start.cluster.min(16 << 10);
                Self::Resize { size, mode: if is_small { modes[rng.below(4) as usize] } else { modes[0] } }
            }
            0 | 1 if start.data_file.is_none() => match rng.below(4) {
                1 if snapshots > 0 => Self::Apply(rng.below(snapshots) as usize),
                2.. if snapshots > 0 => Self::Delete(rng.below(snapshots) as usize),
                _ => Self::Create,
            },
            _ => Self::random_of_bitmaps(rng, world),
        }
    }

    fn random_of_bitmaps(rng: &mut Rng, world: &World) -> Self {
        let name = format!("b{}", rng.below(3));
        let Some(there) = world.bitmaps.get(&name) else {
            return Self::Add {
                name,
                granularity: [0, 512, 4096, 65536][rng.below(4) as usize],
                disabled: rng.one_in(3),
            };
        };
        match rng.below(6) {
            0 => Self::Remove(name),
            1 => Self::Clear(name),
            2 | 3 => Self::Enable(name, !there.enabled),
            _ => {
                let from = world.bitmaps.keys().nth(rng.below(world.bitmaps.len() as u64) as usize).unwrap();
                Self::Merge(name, from.clone())
            }
        }
    }
}

impl World {
    pub fn new(start: &Start) -> Self {
        let layout = Layout::parse_files([&start.image, &start.data]).unwrap();
        Self {
            guest: start.guest(),
            start: start.clone(),
            size: start.guest_size,
            snapshot_sizes: layout.trees[1..].iter().map(|tree| tree.guest_size).collect(),
            bitmaps: BTreeMap::new(),
        }
    }

    /// A change of the guest's is about to be sent.
    pub fn issue(&mut self, offset: u64, data: &[u8]) -> Ticket {
        let sectors = offset / 512..(offset + data.len() as u64).div_ceil(512);
        self.bitmaps
            .values_mut()
            .filter(|bitmap| bitmap.enabled)
            .for_each(|bitmap| bitmap.covers.extend(sectors.clone()));
        self.guest.issue(offset, data)
    }

    /// The world after an operation: each of them makes everything durable that was acknowledged before.
    pub fn after(&self, operation: &Operation) -> Self {
        let mut next = self.clone();
        let sectors = self.start.hot_sectors.clone();
        let latest: Vec<_> = sectors.iter().map(|&sector| Rc::new(*self.guest.latest(sector))).collect();
        let mut content = latest.clone();
        match operation {
            Operation::Resize { size, .. } => {
                let (old, new) = (self.size / 512, size / 512);
                for (content, &sector) in content.iter_mut().zip(&sectors) {
                    match sector {
                        _ if sector >= new => *content = Rc::new(PAST_THE_END),
                        _ if sector >= old => *content = Rc::new([0; SECTOR_BYTES]),
                        _ => {}
                    }
                }
                next.size = *size;
            }
            Operation::Create => {
                next.start.snapshots.push(latest.clone());
                next.snapshot_sizes.push(self.size);
            }
            Operation::Apply(index) => {
                content = self.start.snapshots[*index].clone();
                next.size = self.snapshot_sizes[*index];
            }
            Operation::Delete(index) => {
                next.start.snapshots.remove(*index);
                next.snapshot_sizes.remove(*index);
            }
            _ => next.change_bitmaps(operation),
        }
        let changed: BTreeSet<u64> =
            (0..sectors.len()).filter(|&n| content[n] != latest[n]).map(|n| sectors[n]).collect();
        for bitmap in next.bitmaps.values_mut() {
            if bitmap.enabled {
                bitmap.covers.extend(&changed);
            }
            bitmap.covers.retain(|sector| sector * 512 < next.size);
        }
        next.guest = Guest::new(sectors.into_iter().zip(content));
        next
    }

    fn change_bitmaps(&mut self, operation: &Operation) {
        let bitmaps = &mut self.bitmaps;
        match operation {
            Operation::Add { name, granularity, disabled } => {
                let granularity = if *granularity == 0 { self.start.cluster.clamp(4096, 65536) } else { *granularity };
                bitmaps.insert(name.clone(), Tracked { enabled: !disabled, granularity, covers: BTreeSet::new() });
            }
            Operation::Remove(name) => drop(bitmaps.remove(name)),
            Operation::Clear(name) => bitmaps.get_mut(name).unwrap().covers.clear(),
            Operation::Enable(name, on) => bitmaps.get_mut(name).unwrap().enabled = *on,
            Operation::Merge(to, from) => {
                let covers = bitmaps[from].covers.clone();
                bitmaps.get_mut(to).unwrap().covers.extend(covers);
            }
            _ => unreachable!("the others are no operations on bitmaps"),
        }
    }

    /// What is wrong with a disk, if it is to be this world. Bitmaps that are marked in use may say anything; with
    /// `all_stored` none may be.
    pub fn judge(
        &self,
        judge: &mut Judge,
        files: [&DiskImage; 2],
        sample: (u64, u64),
        all_stored: bool,
    ) -> Vec<String> {
        let mut wrong = judge_files(judge, files, &self.guest, &self.start, sample);
        let Ok(layout) = Layout::parse_files(files) else { return wrong };
        if layout.trees[0].guest_size != self.size {
            wrong.push(format!("D9: the disk has {} bytes instead of {}", layout.trees[0].guest_size, self.size));
        }
        let found = match judge::bitmaps(&layout) {
            Ok(found) => found,
            Err(why) => return [wrong, vec![format!("D10: {why}")]].concat(),
        };
        let names: Vec<&String> = found.iter().map(|bitmap| &bitmap.name).collect();
        if names.iter().copied().collect::<BTreeSet<_>>() != self.bitmaps.keys().collect() {
            wrong.push(format!("D10: there are bitmaps {names:?} instead of {:?}", self.bitmaps.keys()));
            return wrong;
        }
        for bitmap in &found {
            let tracked = &self.bitmaps[&bitmap.name];
            let missing = tracked.covers.iter().find(|sector| !bitmap.is_dirty(&layout, **sector));
            if bitmap.in_use && !all_stored {
                continue;
            }
            if bitmap.in_use || bitmap.auto != tracked.enabled || bitmap.granularity != tracked.granularity {
                wrong.push(format!("D10: bitmap {} is {bitmap:?}", bitmap.name));
            } else if let Some(sector) = missing {
                wrong.push(format!("D10: bitmap {} does not cover the change of sector {sector}", bitmap.name));
            }
        }
        wrong
    }

    /// Whether the handle shows this world, as far as operations change it.
    pub fn is_shown_by(&self, image: &Image) -> bool {
        let bitmaps: BTreeMap<String, bool> = image.bitmap_list().map_or_else(
            |_| BTreeMap::new(),
            |list| list.into_iter().map(|bitmap| (bitmap.name, bitmap.enabled)).collect(),
        );
        let expected = self.bitmaps.iter().map(|(name, tracked)| (name.clone(), tracked.enabled)).collect();
        let snapshots = image.snapshots().map(|list| list.len()).unwrap_or(0);
        image.size() == self.size && snapshots == self.start.snapshots.len() && bitmaps == expected
    }
}
