//! The cache of L2 slices: bounded, read without locks, written back in batches.
//!
//! A slot holds one slice. Readers find it by its key in a set of at most [`WAYS`] slots and read its words under the slot's
//! sequence number: odd while the slot changes, and a reader that saw it change reads again. Reads write nothing
//! shared but the recency mark, and that only when it is not set, so readers on different threads do not slow each
//! other down. Everything that changes a slot holds the lock of `inner`; no I/O happens under it.
//!
//! A slot is clean, DIRTY, WRITING, or both: a slice that changes while it is being written stays dirty (M5), and
//! one that is being written cannot be evicted, because a reload would race the write.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Mutex, OnceLock};

use crate::format::l2::{COMPRESSED, COPIED};
use crate::format::{Geometry, L2Entry, SliceIndex, words as stored_words};
use crate::wait::lock;

/// Slots of a set.
const WAYS: usize = 16;
/// Reads of a changing slot before a reader waits on the lock of whoever changes it.
const SPINS: u32 = 64;
const DIRTY: u8 = 1;
const WRITING: u8 = 2;

struct Inner {
    flags: Box<[u8]>,
    dirty: Vec<u32>,      // slots with DIRTY
    waits_for_data: bool, // one of them shows what has to be durable before it
    hands: Box<[u8]>,     // where the clock of each set stands
}

/// What there is to know of a slice's place, without its words: together, so that a reader finds it in one line.
#[derive(Default)]
struct Slot {
    key: AtomicU64, // slice index + 1; 0 is empty
    sequence: AtomicU32,
    recent: AtomicU8,
}

/// One cache. Its memory is reserved at once and only touched as it fills.
pub struct L2Cache {
    geometry: Geometry,
    holds_disk: AtomicBool, // there is a slot for every slice that the disk has
    ways: usize,
    set_bits: u32,
    words_per_slice: usize,
    slots: Box<[Slot]>,
    words: Box<[AtomicU64]>,
    inner: Mutex<Inner>,
}

/// A slice whose words may be changing while they are read; what is computed from it counts only if they did not.
pub struct SliceView<'a> {
    words: &'a [AtomicU64],
    extended: bool,
}

impl SliceView<'_> {
    /// Entry `index` as stored.
    #[inline]
    pub fn entry(&self, index: usize) -> L2Entry {
        if self.extended {
            L2Entry {
                descriptor: self.words[index * 2].load(Ordering::Relaxed),
                bitmap: self.words[index * 2 + 1].load(Ordering::Relaxed),
            }
        } else {
            L2Entry { descriptor: self.words[index].load(Ordering::Relaxed), bitmap: 0 }
        }
    }
}

/// Slices taken for writing, as they were at that moment.
#[derive(Default)]
pub struct DirtySlices {
    slices: Vec<(SliceIndex, u32)>, // with their slots, in order
    bytes: Vec<u8>,
    slice_bytes: usize,
    waits_for_data: bool,
}

impl DirtySlices {
    /// Whether something has to be durable before they are written: data that they show, or counts of what they refer to.
    pub fn wait_for_data(&self) -> bool {
        self.waits_for_data
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }

    /// Runs of slices that follow each other inside one L2 table, with their bytes: each is one write.
    pub fn runs(&self, geometry: Geometry) -> impl Iterator<Item = (SliceIndex, &[u8])> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let (first, _) = *self.slices.get(at)?;
            let start = at;
            let table = geometry.l1_index_of_slice(first);
            at += 1;
            while let Some(&(next, _)) = self.slices.get(at)
                && next.0 == first.0 + (at - start) as u64
                && geometry.l1_index_of_slice(next) == table
            {
                at += 1;
            }
            Some((first, &self.bytes[start * self.slice_bytes..at * self.slice_bytes]))
        })
    }
}

/// Words that start as zero and take no memory until they are touched.
fn zeroed_words(n: usize) -> Box<[AtomicU64]> {
    let words = Box::<[AtomicU64]>::new_zeroed_slice(n);
    // SAFETY: all-zero bytes are a valid AtomicU64.
    unsafe { words.assume_init() }
}

/// Slots that a disk of this size can make use of.
fn useful_slots(geometry: Geometry, disk_bytes: u64) -> u64 {
    disk_bytes.div_ceil(geometry.slice_covers_bytes()).max(4).next_power_of_two()
}

/// The cache of an image: made for the disk as it is when the first slice comes, so that opening an image costs no
/// memory that nobody reads from; and one of the whole budget that takes its place once the disk has outgrown the first.
/// All of them are there to the end, so that readers need no lock to know which one counts; together they take less
/// than twice the budget, as a rule much less.
pub struct L2Slices {
    none: L2Cache, // which nothing is ever in
    first: OnceLock<L2Cache>,
    grown: OnceLock<Box<L2Cache>>,
    has_grown: AtomicBool,
    disk_bytes: AtomicU64, // what the first is to be made for
    budget_bytes: u64,
}

impl L2Slices {
    /// See [`L2Cache::new`].
    pub fn new(geometry: Geometry, budget_bytes: u64, disk_bytes: u64) -> Self {
        Self {
            none: L2Cache::without_slots(geometry),
            first: OnceLock::new(),
            grown: OnceLock::new(),
            has_grown: AtomicBool::new(false),
            disk_bytes: AtomicU64::new(disk_bytes),
            budget_bytes,
        }
    }

    /// Most bytes of slices that the cache may hold.
    pub fn budget_bytes(&self) -> u64 {
        self.budget_bytes
    }

    /// See [`L2Cache::install`].
    #[must_use]
    pub fn install(&self, slice: SliceIndex, bytes: &[u8]) -> bool {
        if !self.has_grown.load(Ordering::Acquire) {
            let disk_bytes = self.disk_bytes.load(Ordering::Relaxed);
            self.first.get_or_init(|| L2Cache::new(self.geometry, self.budget_bytes, disk_bytes));
        }
        (**self).install(slice, bytes)
    }

    /// Follows the disk to another size. Only for who holds the image alone, with no slice dirty and none being loaded.
    pub fn fit(&self, disk_bytes: u64) {
        if self.first.get().is_none() {
            self.disk_bytes.store(disk_bytes, Ordering::Relaxed);
            return;
        }
        let geometry = self.geometry;
        let useful = useful_slots(geometry, disk_bytes);
        if useful > self.slots() as u64 && !self.has_grown.load(Ordering::Relaxed) {
            self.forget_all();
            self.grown.get_or_init(|| Box::new(L2Cache::new(geometry, self.budget_bytes, u64::MAX >> 1)));
            self.has_grown.store(true, Ordering::Release);
        }
        self.holds_disk.store(useful <= self.slots() as u64, Ordering::Relaxed);
    }
}

impl Deref for L2Slices {
    type Target = L2Cache;

    #[inline]
    fn deref(&self) -> &L2Cache {
        let first = self.first.get().unwrap_or(&self.none);
        match self.has_grown.load(Ordering::Acquire) {
            false => first,
            true => self.grown.get().map_or(first, |grown| grown),
        }
    }
}

impl L2Cache {
    /// A cache of at most `budget_bytes` of slices (at least four), no larger than the disk needs.
    pub fn new(geometry: Geometry, budget_bytes: u64, disk_bytes: u64) -> Self {
        let useful = useful_slots(geometry, disk_bytes);
        let affordable = (budget_bytes / geometry.slice_bytes()).clamp(4, useful);
        // Powers of two that stay within the budget; what the disk needs fits without a slice too many in any set.
        let slots = 1usize << affordable.ilog2();
        let ways = WAYS.min(slots);
        let sets = slots / ways;
        let words_per_slice = (geometry.slice_bytes() / 8) as usize;
        Self {
            geometry,
            holds_disk: AtomicBool::new(affordable == useful),
            ways,
            set_bits: sets.trailing_zeros(),
            words_per_slice,
            slots: (0..slots).map(|_| Slot::default()).collect(),
            words: zeroed_words(slots * words_per_slice),
            inner: Mutex::new(Inner {
                flags: vec![0; slots].into_boxed_slice(),
                dirty: Vec::new(),
                waits_for_data: false,
                hands: vec![0; sets].into_boxed_slice(),
            }),
        }
    }

    /// A cache that nothing can be put into. It has one slot, which stays empty, so that looking into it is no special case.
    fn without_slots(geometry: Geometry) -> Self {
        Self {
            geometry,
            holds_disk: AtomicBool::new(true),
            ways: 1,
            set_bits: 0,
            words_per_slice: (geometry.slice_bytes() / 8) as usize,
            slots: Box::new([Slot::default()]),
            words: Box::default(),
            inner: Mutex::new(Inner {
                flags: Box::default(),
                dirty: Vec::new(),
                waits_for_data: false,
                hands: Box::default(),
            }),
        }
    }

    /// Number of slices that fit.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is a slot for every slice that the disk has.
    pub fn holds_disk(&self) -> bool {
        self.holds_disk.load(Ordering::Relaxed)
    }

    fn set_of(&self, slice: SliceIndex) -> usize {
        // As many neighbours as there are sets go to as many sets, in an order that depends on the neighbourhood: so
        // nothing is evicted from a cache that can hold the disk, and power-of-two strides stay apart in others.
        let neighbourhood = slice.0 >> self.set_bits;
        let mixed = slice.0 ^ (neighbourhood.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40);
        (mixed & ((1 << self.set_bits) - 1)) as usize
    }

    /// The first slot of a slice's set, and the way of the set that it prefers: each slice has one, so that slices which
    /// share a set rarely have to be searched for.
    #[inline]
    fn preferred(&self, slice: SliceIndex) -> (usize, usize) {
        (self.set_of(slice) * self.ways, (slice.0 >> self.set_bits) as usize & (self.ways - 1))
    }

    /// Slots that may hold a slice, the likeliest first.
    fn candidates(&self, slice: SliceIndex) -> impl Iterator<Item = usize> {
        let (first, preferred) = self.preferred(slice);
        (preferred..self.ways).chain(0..preferred).map(move |way| first + way)
    }

    fn slot_of(&self, slice: SliceIndex) -> Option<usize> {
        self.candidates(slice).find(|&slot| self.slots[slot].key.load(Ordering::Acquire) == slice.0 + 1)
    }

    #[inline]
    fn slot_words(&self, slot: usize) -> &[AtomicU64] {
        &self.words[slot * self.words_per_slice..(slot + 1) * self.words_per_slice]
    }

    /// Runs `look` on the slice and returns its result, if the slice is cached. `look` may run more than once, on
    /// words that are changing; only its last run, on words that did not change, counts.
    #[inline]
    pub fn look<R>(&self, slice: SliceIndex, mut look: impl FnMut(&SliceView<'_>) -> R) -> Option<R> {
        let (first, way) = self.preferred(slice);
        // Nearly always it is there, and nobody changes it.
        match self.look_into(first + way, slice, &mut look) {
            Some(found) => Some(found),
            None => self.search(slice, &mut look),
        }
    }

    /// One attempt at one slot. `None`: the slice is not there, or the slot is changing.
    #[inline]
    fn look_into<R>(&self, slot: usize, slice: SliceIndex, look: impl FnOnce(&SliceView<'_>) -> R) -> Option<R> {
        let place = &self.slots[slot];
        let before = place.sequence.load(Ordering::Acquire);
        if before & 1 != 0 || place.key.load(Ordering::Acquire) != slice.0 + 1 {
            return None;
        }
        let result = look(&SliceView { words: self.slot_words(slot), extended: self.geometry.extended_l2 });
        fence(Ordering::Acquire);
        if place.sequence.load(Ordering::Relaxed) != before {
            return None;
        }
        if place.recent.load(Ordering::Relaxed) == 0 {
            place.recent.store(1, Ordering::Relaxed);
        }
        Some(result)
    }

    /// The rest of [`L2Cache::look`].
    #[cold]
    fn search<R>(&self, slice: SliceIndex, look: &mut impl FnMut(&SliceView<'_>) -> R) -> Option<R> {
        let mut spins = 0u32;
        loop {
            let slot = self.slot_of(slice)?;
            if let Some(found) = self.look_into(slot, slice, &mut *look) {
                return Some(found);
            }
            spins += 1;
            if spins.is_multiple_of(SPINS) {
                drop(lock(&self.inner)); // whoever changes the slot holds this lock, and may have been preempted
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// Copies the words of a slice, if it is cached.
    #[must_use]
    pub fn copy(&self, slice: SliceIndex, words: &mut [u64]) -> bool {
        let copy = |view: &SliceView<'_>| {
            for (to, from) in words.iter_mut().zip(view.words) {
                *to = from.load(Ordering::Relaxed);
            }
        };
        self.look(slice, copy).is_some()
    }

    /// Changes a slot's words; the caller holds the lock of `inner`.
    fn change(&self, slot: usize, change: impl FnOnce(&[AtomicU64])) {
        let before = self.slots[slot].sequence.load(Ordering::Relaxed);
        self.slots[slot].sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        change(self.slot_words(slot));
        self.slots[slot].sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// Puts a slice that was read from disk into the cache. `false`: every slot it could go to is dirty, and a
    /// write-back has to come first.
    #[must_use]
    pub fn install(&self, slice: SliceIndex, bytes: &[u8]) -> bool {
        let mut inner = lock(&self.inner);
        if self.slot_of(slice).is_some() {
            return true;
        }
        let Some(slot) = self.victim(&mut inner, slice) else { return false };
        self.change(slot, |words| {
            self.slots[slot].key.store(slice.0 + 1, Ordering::Relaxed);
            for (word, stored) in words.iter().zip(stored_words(bytes)) {
                word.store(stored, Ordering::Relaxed);
            }
        });
        self.slots[slot].recent.store(1, Ordering::Relaxed);
        true
    }

    /// A slot for a slice that is empty or clean, least recently used by the clock's reckoning.
    fn victim(&self, inner: &mut Inner, slice: SliceIndex) -> Option<usize> {
        if let Some(empty) = self.candidates(slice).find(|&slot| self.slots[slot].key.load(Ordering::Relaxed) == 0) {
            return Some(empty);
        }
        let set = self.set_of(slice);
        let first = set * self.ways;
        for _ in 0..self.ways * 2 {
            let way = usize::from(inner.hands[set]);
            inner.hands[set] = ((way + 1) % self.ways) as u8;
            let slot = first + way;
            if inner.flags[slot] == 0 && self.slots[slot].recent.swap(0, Ordering::Relaxed) == 0 {
                return Some(slot);
            }
        }
        self.candidates(slice).find(|&slot| inner.flags[slot] == 0)
    }

    /// Changes entries of a cached slice and marks it dirty, all at once for readers and for write-back. `early`: they
    /// may reach the disk before anything else is durable, because the guest then sees what it saw, and all that is
    /// referred to is counted. `false`: the slice is not cached.
    #[must_use]
    pub fn update(&self, slice: SliceIndex, entries: &[(usize, L2Entry)], early: bool) -> bool {
        let mut inner = lock(&self.inner);
        let Some(slot) = self.slot_of(slice) else { return false };
        self.change(slot, |words| {
            for &(index, entry) in entries {
                if self.geometry.extended_l2 {
                    words[index * 2].store(entry.descriptor, Ordering::Relaxed);
                    words[index * 2 + 1].store(entry.bitmap, Ordering::Relaxed);
                } else {
                    words[index].store(entry.descriptor, Ordering::Relaxed);
                }
            }
        });
        inner.waits_for_data |= !early;
        if inner.flags[slot] & DIRTY == 0 {
            inner.flags[slot] |= DIRTY;
            inner.dirty.push(slot as u32);
        }
        true
    }

    /// Drops clean slices from the cache. (None of them can be dirty: only tables of our own are changed.)
    pub fn forget(&self, slices: std::ops::Range<SliceIndex>) {
        let inner = lock(&self.inner);
        for slot in (slices.start.0..slices.end.0).filter_map(|slice| self.slot_of(SliceIndex(slice))) {
            debug_assert_eq!(inner.flags[slot], 0, "a table that is not ours was changed");
            self.change(slot, |_| self.slots[slot].key.store(0, Ordering::Relaxed));
        }
    }

    /// Drops slices of a table that is given up from the cache, and with them what waits to be written. None of them may
    /// be on its way to the disk.
    pub fn give_up(&self, slices: std::ops::Range<SliceIndex>) {
        let mut inner = lock(&self.inner);
        for slot in (slices.start.0..slices.end.0).filter_map(|slice| self.slot_of(SliceIndex(slice))) {
            debug_assert_eq!(inner.flags[slot] & WRITING, 0, "a pass would write into a table that is gone");
            inner.flags[slot] = 0;
            inner.dirty.retain(|&dirty| dirty as usize != slot);
            self.change(slot, |_| self.slots[slot].key.store(0, Ordering::Relaxed));
        }
    }

    /// Drops everything from the cache. Nothing in it may be dirty.
    pub fn forget_all(&self) {
        let inner = lock(&self.inner);
        for slot in (0..self.slots()).filter(|&slot| self.slots[slot].key.load(Ordering::Relaxed) != 0) {
            debug_assert_eq!(inner.flags[slot], 0, "a slice with changes is dropped");
            self.change(slot, |_| self.slots[slot].key.store(0, Ordering::Relaxed));
        }
    }

    /// Clears the COPIED flags of standard entries in all slices, as has been done in their tables on disk. Nothing may be
    /// dirty.
    pub fn clear_copied(&self) {
        let inner = lock(&self.inner);
        let step = if self.geometry.extended_l2 { 2 } else { 1 };
        for slot in (0..self.slots()).filter(|&slot| self.slots[slot].key.load(Ordering::Relaxed) != 0) {
            debug_assert_eq!(inner.flags[slot], 0, "a slice with changes would differ from the disk");
            self.change(slot, |words| {
                for word in words.iter().step_by(step) {
                    let descriptor = word.load(Ordering::Relaxed);
                    if descriptor & (COPIED | COMPRESSED) == COPIED {
                        word.store(descriptor & !COPIED, Ordering::Relaxed);
                    }
                }
            });
        }
    }

    /// Whether so many slices are dirty that they should be written before a slot is needed. Never in a cache that
    /// holds the whole disk: nothing is ever evicted from that, and a pass costs a barrier.
    pub fn wants_write_back(&self) -> bool {
        !self.holds_disk.load(Ordering::Relaxed) && self.dirty_count() * 2 > self.slots()
    }

    /// Number of dirty slices.
    pub fn dirty_count(&self) -> usize {
        lock(&self.inner).dirty.len()
    }

    /// Takes all dirty slices for writing, as they are now.
    pub fn collect_dirty(&self) -> DirtySlices {
        let mut inner = lock(&self.inner);
        let slots = std::mem::take(&mut inner.dirty);
        let mut slices: Vec<(SliceIndex, u32)> = Vec::with_capacity(slots.len());
        for slot in slots {
            let flags = &mut inner.flags[slot as usize];
            *flags = *flags & !DIRTY | WRITING;
            slices.push((SliceIndex(self.slots[slot as usize].key.load(Ordering::Relaxed) - 1), slot));
        }
        slices.sort_unstable();
        let slice_bytes = self.words_per_slice * 8;
        let mut bytes = Vec::with_capacity(slices.len() * slice_bytes);
        for &(_, slot) in &slices {
            for word in self.slot_words(slot as usize) {
                bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_be_bytes());
            }
        }
        let waits_for_data = std::mem::take(&mut inner.waits_for_data);
        DirtySlices { slices, bytes, slice_bytes, waits_for_data }
    }

    /// Ends the writing of collected slices; after a failure they are dirty again.
    pub fn written(&self, slices: &DirtySlices, succeeded: bool) {
        let mut inner = lock(&self.inner);
        for &(_, slot) in &slices.slices {
            let flags = &mut inner.flags[slot as usize];
            *flags &= !WRITING;
            if !succeeded && *flags & DIRTY == 0 {
                *flags |= DIRTY;
                inner.dirty.push(slot);
            }
        }
        inner.waits_for_data |= !succeeded; // it is no time to save barriers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };

    fn entry(n: u64) -> L2Entry {
        L2Entry { descriptor: n, bitmap: !n }
    }

    #[test]
    fn a_slice_that_changes_while_it_is_written_stays_dirty() {
        let cache = L2Cache::new(G, 1 << 20, 1 << 40);
        assert!(!cache.update(SliceIndex(3), &[(0, entry(1))], false), "not cached yet");
        assert!(cache.install(SliceIndex(3), &[0; 4096]));
        assert!(cache.update(SliceIndex(3), &[(7, entry(1))], false));
        let taken = cache.collect_dirty();
        assert!(cache.update(SliceIndex(3), &[(8, entry(2))], false));
        cache.written(&taken, true);
        assert_eq!(cache.dirty_count(), 1);
        let (slice, bytes) = taken.runs(G).next().unwrap();
        assert_eq!((slice, &bytes[7 * 16..7 * 16 + 8]), (SliceIndex(3), &1u64.to_be_bytes()[..]));
        assert_eq!(bytes[8 * 16..9 * 16], [0; 16], "what came later is not in it");
        cache.written(&cache.collect_dirty(), false);
        assert_eq!(cache.dirty_count(), 1, "a failed write leaves it dirty");
    }

    #[test]
    fn dirty_slices_are_not_evicted_and_clean_ones_are() {
        let cache = L2Cache::new(G, 4 * 4096, 1 << 40);
        assert_eq!((cache.slots(), cache.wants_write_back()), (4, false));
        for i in 0..4 {
            assert!(cache.install(SliceIndex(i), &[0; 4096]));
            assert!(cache.update(SliceIndex(i), &[(0, entry(i + 1))], false));
        }
        assert!(cache.wants_write_back());
        assert!(!cache.install(SliceIndex(9), &[0; 4096]), "all are dirty");
        let taken = cache.collect_dirty();
        assert!(!cache.install(SliceIndex(9), &[0; 4096]), "all are being written");
        cache.written(&taken, true);
        assert!(cache.install(SliceIndex(9), &[0; 4096]));
        let cached = (0..4).filter(|&i| cache.look(SliceIndex(i), |_| ()).is_some()).count();
        assert_eq!(cached, 3);
    }

    #[test]
    fn what_fits_is_never_evicted() {
        let covers = G.slice_covers_bytes();
        for slices in [1, 4, 5, 16, 17, 63, 64, 100, 1000, 4096] {
            let cache = L2Cache::new(G, 32 << 20, slices * covers);
            for i in 0..slices {
                assert!(cache.install(SliceIndex(i), &[0; 4096]), "no room for slice {i} of {slices}");
                assert!(cache.update(SliceIndex(i), &[(0, entry(i))], false));
            }
            assert!((0..slices).all(|i| cache.look(SliceIndex(i), |_| ()).is_some()), "{slices} slices");
            assert!(!cache.wants_write_back());
        }
    }

    #[test]
    fn a_disk_that_grows_gets_the_whole_budget() {
        let covers = G.slice_covers_bytes();
        let cache = L2Slices::new(G, 64 * 4096, 4 * covers);
        assert!(cache.look(SliceIndex(1), |_| ()).is_none() && !cache.update(SliceIndex(1), &[(0, entry(1))], false));
        assert!(cache.install(SliceIndex(1), &[1; 4096]));
        assert_eq!(cache.slots(), 4);
        cache.fit(3 * covers);
        assert!(cache.look(SliceIndex(1), |_| ()).is_some(), "it still fits");
        cache.fit(5 * covers);
        assert_eq!((cache.slots(), cache.wants_write_back()), (64, false));
        assert!(cache.look(SliceIndex(1), |_| ()).is_none());
        for i in 0..64 {
            assert!(cache.install(SliceIndex(i), &[0; 4096]) && cache.update(SliceIndex(i), &[(0, entry(i))], false));
        }
        assert!(!cache.wants_write_back());
        cache.fit(65 * covers);
        assert_eq!((cache.slots(), cache.wants_write_back()), (64, true));
    }

    #[test]
    fn a_cache_is_made_for_the_disk_that_there_is_when_the_first_slice_comes() {
        let covers = G.slice_covers_bytes();
        let cache = L2Slices::new(G, 64 * 4096, 4 * covers);
        cache.fit(8 * covers);
        for slices in [0..1, 0..8] {
            cache.forget(SliceIndex(slices.start)..SliceIndex(slices.end));
            cache.give_up(SliceIndex(slices.start)..SliceIndex(slices.end));
        }
        cache.forget_all();
        cache.clear_copied();
        assert!(cache.collect_dirty().is_empty() && !cache.wants_write_back());
        assert!(cache.install(SliceIndex(7), &[0; 4096]));
        assert_eq!((cache.slots(), cache.look(SliceIndex(7), |_| ())), (8, Some(())));
    }

    #[test]
    fn runs_join_neighbours_inside_a_table_only() {
        let cache = L2Cache::new(G, 1 << 20, 1 << 40);
        for i in [14, 15, 16, 17, 20] {
            assert!(cache.install(SliceIndex(i), &[0; 4096]) && cache.update(SliceIndex(i), &[(0, entry(i))], false));
        }
        let taken = cache.collect_dirty();
        let runs: Vec<(u64, usize)> = taken.runs(G).map(|(s, b)| (s.0, b.len() / 4096)).collect();
        assert_eq!(runs, [(14, 2), (16, 2), (20, 1)]); // a table has 16 slices
    }

    #[test]
    fn readers_never_see_half_an_entry() {
        let cache = L2Cache::new(G, 1 << 20, 1 << 40);
        assert!(cache.install(SliceIndex(0), &[0; 4096]) && cache.update(SliceIndex(0), &[(5, entry(0))], false));
        std::thread::scope(|scope| {
            scope.spawn(|| (0..200_000).for_each(|n| assert!(cache.update(SliceIndex(0), &[(5, entry(n))], false))));
            for _ in 0..200_000 {
                let seen = cache.look(SliceIndex(0), |view| view.entry(5)).unwrap();
                assert_eq!(seen, entry(seen.descriptor));
            }
        });
    }
}
