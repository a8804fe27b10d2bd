//! Everything that changes an image as a whole, among writes: other sizes, snapshots and bitmaps, in random order, by us
//! and by QEMU in turns, against flat arrays.

use std::collections::{BTreeMap, BTreeSet};

use super::judge::{self, Layout};
use super::{
    Image, Rng, Shape, check_end, check_snapshots, half_random_bytes, number, open, qemu, random_bytes, range, shapes,
};
use qcow2::Error;
use qcow2::format::GuestOffset;
use qcow2::image::{BitmapOptions, Preallocation, ResizeOptions, SnapshotFacts, WriteFlags, ZeroFlags};
use qcow2::storage::IoSrc;
use qcow2::storage::sim::DiskImage;

/// A bitmap, and the offsets of granules that have to be dirty in it.
struct Bitmap {
    granularity: u64,
    enabled: bool,
    covers: BTreeSet<u64>,
}

/// An image and all that it holds.
struct Model<'a> {
    shape: &'a Shape,
    path: String,
    content: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    taken: u32,
    bitmaps: BTreeMap<String, Bitmap>,
}

impl Model<'_> {
    fn set(&mut self, at: u64, data: &[u8]) {
        self.content[at as usize..at as usize + data.len()].copy_from_slice(data);
        self.note(at, data.len() as u64);
    }

    fn note(&mut self, at: u64, length: u64) {
        for bitmap in self.bitmaps.values_mut().filter(|bitmap| bitmap.enabled && length > 0) {
            let g = bitmap.granularity;
            bitmap.covers.extend((at / g..=(at + length - 1) / g).map(|n| n * g));
        }
    }

    /// The disk becomes something else as a whole.
    fn become_other(&mut self, content: Vec<u8>, by_us: bool) {
        let old = std::mem::replace(&mut self.content, content);
        let differs = |at: &usize| old.get(*at..at + 512) != self.content.get(*at..at + 512);
        let changed: Vec<usize> = (0..self.content.len()).step_by(512).filter(differs).collect();
        for at in changed.into_iter().filter(|at| by_us || *at < old.len()) {
            self.note(at as u64, 512);
        }
        let size = self.content.len() as u64;
        self.bitmaps.values_mut().for_each(|bitmap| bitmap.covers.retain(|&at| at < size));
    }

    fn write(&mut self, image: &Image, rng: &mut Rng) {
        let size = self.content.len() as u64;
        let (at, length) = range(rng, self.shape, 0, size);
        let cluster = 1u64 << self.shape.cluster_bits;
        let (from, to) = (at / cluster * cluster, (at + length).next_multiple_of(cluster).min(size));
        match rng.below(8) {
            0 => {
                let flags = ZeroFlags { may_unmap: rng.one_in(2), ..ZeroFlags::default() };
                image.write_zeroes(at, length, flags).unwrap();
                self.set(at, &vec![0; length as usize]);
            }
            1 if self.shape.version == 3 => {
                image.discard(from, to - from).unwrap();
                self.set(from, &vec![0; (to - from) as usize]);
            }
            2 => {
                let data = half_random_bytes(rng, to - from);
                let flags = WriteFlags { compressed: true, fua: false };
                image.write(&[IoSrc::from(&data[..])], GuestOffset(from), flags).unwrap();
                self.set(from, &data);
            }
            _ => {
                let data = random_bytes(rng, length);
                image.pwrite(&data, at).unwrap();
                self.set(at, &data);
            }
        }
    }

    fn resize(&mut self, image: &Image, rng: &mut Rng) {
        let old = self.content.len() as u64;
        let most = self.shape.size * 3 / 2;
        let size = match rng.below(3) {
            0 => (old + rng.below(5000)).saturating_sub(rng.below(5000)),
            _ => rng.below(most),
        };
        let size = size.max(1).next_multiple_of(512);
        let modes = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
        let preallocation = if size > old { modes[rng.below(4) as usize] } else { Preallocation::Off };
        match image.resize(size, ResizeOptions { allow_shrink: true, preallocation }, None) {
            Err(Error::Unsupported { .. }) if self.shape.version == 2 => {}
            result => {
                result.unwrap_or_else(|e| panic!("{old} to {size}: {e}"));
                let mut content = self.content.clone();
                content.resize(size as usize, 0);
                self.become_other(content, true);
                self.note(old, size.saturating_sub(old));
            }
        }
    }

    fn snapshot(&mut self, image: &Image, rng: &mut Rng) {
        let index = rng.below(self.snapshots.len().max(1) as u64) as usize;
        match rng.below(3) {
            0 if !self.snapshots.is_empty() => {
                let (name, content) = self.snapshots[index].clone();
                match image.snapshot_apply(&name) {
                    Err(Error::TooLarge { .. }) if self.shape.refcount_bits < 4 => {}
                    result => {
                        result.unwrap();
                        self.become_other(content, true);
                    }
                }
            }
            1 if !self.snapshots.is_empty() => {
                let (name, _) = self.snapshots.remove(index);
                image.snapshot_delete(&name, None).unwrap();
            }
            _ if self.snapshots.len() < 3 => {
                self.taken += 1;
                let name = format!("taken-{}", self.taken);
                match image.snapshot_create(&name, &SnapshotFacts::default()) {
                    Err(Error::TooLarge { .. }) if self.shape.refcount_bits < 4 => {}
                    result => {
                        result.unwrap();
                        self.snapshots.push((name, self.content.clone()));
                    }
                }
            }
            _ => {}
        }
    }

    fn bitmap(&mut self, image: &Image, rng: &mut Rng) {
        let name = format!("b{}", rng.below(3));
        let Some(bitmap) = self.bitmaps.get_mut(&name) else {
            let (granularity, enabled) = (512 << (3 * rng.below(3)), !rng.one_in(3));
            image.bitmap_add(&name, BitmapOptions { granularity_bytes: granularity, disabled: !enabled }).unwrap();
            self.bitmaps.insert(name, Bitmap { granularity, enabled, covers: BTreeSet::new() });
            return;
        };
        match rng.below(5) {
            0 => {
                image.bitmap_remove(&name).unwrap();
                self.bitmaps.remove(&name);
            }
            1 => {
                image.bitmap_clear(&name).unwrap();
                bitmap.covers.clear();
            }
            2 => {
                bitmap.enabled = !bitmap.enabled;
                image.bitmap_enable(&name, bitmap.enabled).unwrap();
            }
            _ => {
                let from = self.bitmaps.keys().nth(rng.below(self.bitmaps.len() as u64) as usize).unwrap().clone();
                image.bitmap_merge(&name, None, &from).unwrap();
                let covers: Vec<u64> = self.bitmaps[&from].covers.iter().copied().collect();
                let bitmap = self.bitmaps.get_mut(&name).unwrap();
                bitmap.covers.extend(covers.into_iter().map(|at| at / bitmap.granularity * bitmap.granularity));
            }
        }
    }

    fn by_us(&mut self, rng: &mut Rng, tiny: bool) {
        let image = open(&self.path, tiny);
        for _ in 0..4 + rng.below(12) {
            match rng.below(12) {
                0 => self.resize(&image, rng),
                1 | 2 => self.snapshot(&image, rng),
                3 | 4 if self.shape.version == 3 => self.bitmap(&image, rng),
                5 => image.flush().unwrap(),
                _ => self.write(&image, rng),
            }
            let mut seen = vec![0xaa; self.content.len()];
            image.pread(&mut seen, 0).unwrap();
            let wrong = seen.iter().zip(&self.content).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{:?}", self.shape);
        }
        image.close().unwrap();
    }

    fn by_qemu(&mut self, dir: &qemu::Dir, rng: &mut Rng) {
        let cluster = 1u64 << self.shape.cluster_bits;
        match rng.below(4) {
            // What QEMU leaves behind an end in the middle of a cluster shows up when the disk grows again, and what it
            // leaves in the tables of snapshots is its own.
            0 if self.snapshots.is_empty() && self.shape.chain == 0 => {
                let size = (1 + rng.below(self.shape.size * 3 / 2)).next_multiple_of(cluster);
                qemu::img(&["resize", "-q", "-f", "qcow2", "--shrink", &self.path, &size.to_string()]);
                let mut content = self.content.clone();
                content.resize(size as usize, 0);
                self.become_other(content, false);
            }
            // It refuses to apply where there are bitmaps.
            1 if self.bitmaps.is_empty() && !self.snapshots.is_empty() => {
                let (name, content) = self.snapshots[rng.below(self.snapshots.len() as u64) as usize].clone();
                if content.len() == self.content.len() {
                    qemu::img(&["snapshot", "-a", &name, &self.path]);
                    self.become_other(content, false);
                }
            }
            2 if self.shape.refcount_bits >= 4 && self.snapshots.len() < 3 => {
                self.taken += 1;
                let name = format!("taken-{}", self.taken);
                qemu::img(&["snapshot", "-c", &name, &self.path]);
                self.snapshots.push((name, self.content.clone()));
            }
            _ => {
                let size = self.content.len() as u64;
                let (at, length) = range(rng, self.shape, 0, size);
                let (at, end) = (at / 512 * 512, (at + length).next_multiple_of(512).min(size));
                let (data, patch) = (random_bytes(rng, end - at), dir.path("patch"));
                std::fs::write(&patch, &data).unwrap();
                qemu::io(&self.path, &[&format!("write -q -s {patch} {at} {}", end - at)]);
                self.set(at, &data);
            }
        }
    }

    fn check(&self, dir: &qemu::Dir, label: &str) {
        check_end(&self.path, dir, &self.content, label);
        let image = DiskImage::new(std::fs::read(&self.path).unwrap());
        let layout = Layout::parse(&image).unwrap();
        let found = judge::bitmaps(&layout).unwrap();
        assert!(found.iter().map(|bitmap| &bitmap.name).collect::<BTreeSet<_>>() == self.bitmaps.keys().collect());
        for bitmap in &found {
            let (model, dirty) = (&self.bitmaps[&bitmap.name], bitmap.dirty(&layout));
            assert!((bitmap.auto, bitmap.in_use) == (model.enabled, false), "{label}: {bitmap:?}");
            let missing = model.covers.iter().find(|at| dirty.binary_search(at).is_err());
            assert_eq!(missing, None, "{label}: bitmap {} says too little", bitmap.name);
        }
        check_snapshots(&self.path, dir, &self.snapshots, self.content.len(), label);
    }
}

#[test]
fn sizes_snapshots_and_bitmaps_by_both_tools_in_turns() {
    let Some(dir) = qemu::dir("model-operations") else { return };
    // The small ones: each operation is followed by a read of the whole disk.
    let is_small = |shape: &Shape| [9, 11, 12, 14, 15].contains(&shape.cluster_bits);
    for (n, shape) in shapes().into_iter().enumerate().filter(|(_, shape)| is_small(shape)) {
        let label = format!("shape {n}: {shape:?}");
        let mut rng = Rng::new(number("MODEL_SEED", 1) * 1000 + n as u64);
        let (path, content) = shape.make(&dir, &mut rng);
        let (snapshots, bitmaps) = (Vec::new(), BTreeMap::new());
        let mut model = Model { shape: &shape, path, content, snapshots, taken: 0, bitmaps };
        for round in 0..number("MODEL_OPS", 200) / 25 {
            model.by_us(&mut rng, n % 2 == 0);
            if rng.one_in(2) {
                model.by_qemu(&dir, &mut rng);
            }
            if round % 3 == 0 {
                model.check(&dir, &format!("{label}, round {round}"));
            }
        }
        model.check(&dir, &label);
        std::fs::remove_file(&model.path).unwrap();
    }
}
