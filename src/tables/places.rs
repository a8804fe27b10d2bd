//! PURE: where the tables lie that a table of tables refers to. The overlap checks ask for every cluster that is handed
//! out, and a table may have millions of entries: hence no search through them.

use std::collections::BTreeMap;
use std::ops::Range;

/// How many entries refer to each cluster that any refers to. Its memory is proportional to these entries. Offset 0, and
/// what is no offset of a cluster, refers to none.
#[derive(Debug, PartialEq, Eq)]
pub struct Places {
    cluster_bytes: u64,
    entries: BTreeMap<u64, u32>,
}

impl Places {
    /// Of entries with these offsets.
    pub fn of(cluster_bytes: u64, offsets: impl Iterator<Item = u64>) -> Self {
        let mut places = Self { cluster_bytes, entries: BTreeMap::new() };
        places.refill(offsets);
        places
    }

    /// Follows a table whose entries are others now, all of them.
    pub fn refill(&mut self, offsets: impl Iterator<Item = u64>) {
        self.entries.clear();
        let mut sorted: Vec<u64> = offsets.filter(|&offset| self.is_place(offset)).collect();
        sorted.sort_unstable();
        self.entries = sorted.chunk_by(|a, b| a == b).map(|group| (group[0], group.len() as u32)).collect();
    }

    fn is_place(&self, offset: u64) -> bool {
        offset != 0 && offset.is_multiple_of(self.cluster_bytes)
    }

    /// Follows an entry with the offset `old`, which is `new` now.
    pub fn change(&mut self, old: u64, new: u64) {
        if self.is_place(new) {
            *self.entries.entry(new).or_insert(0) += 1;
        }
        if let Some(count) = self.entries.get_mut(&old) {
            *count -= 1;
            if *count == 0 {
                self.entries.remove(&old);
            }
        }
    }

    /// The first cluster in a range of offsets that an entry refers to, one with the offset `own` not counted.
    pub fn first_in(&self, offsets: Range<u64>, own: Option<u64>) -> Option<u64> {
        let mut found = self.entries.range(offsets);
        found.find(|&(&offset, &count)| count > u32::from(own == Some(offset))).map(|(&offset, _)| offset)
    }
}

#[cfg(test)]
mod tests {
    use super::Places;

    /// Against a search through the entries: all sequences of four changes of three entries, to no cluster, to half of one
    /// and to two others.
    #[test]
    fn places_are_what_a_search_through_the_entries_finds() {
        let mut found = [0; 2];
        for sequence in 0..12u64.pow(4) {
            let mut table = [512, 0, 2048];
            let mut places = Places::of(1024, table.into_iter());
            for step in (0..4).map(|n| sequence / 12u64.pow(n) % 12) {
                let (index, new) = (step as usize % 3, [0, 512, 1024, 2048][step as usize / 3]);
                places.change(std::mem::replace(&mut table[index], new), new);
                assert_eq!(places, Places::of(1024, table.into_iter()), "{sequence}");
            }
            let ranges = [(0..1), (0..1025), (1024..2048), (1025..2049), (2049..4096)];
            for (range, own) in ranges.into_iter().flat_map(|range| (0..4).map(move |own| (range.clone(), own))) {
                let others = table.iter().enumerate().filter(|(index, _)| *index != own).map(|(_, &offset)| offset);
                let expected = others.filter(|at| [1024, 2048].contains(at) && range.contains(at)).min();
                assert_eq!(places.first_in(range, table.get(own).copied()), expected, "{table:?} without {own}");
                found[usize::from(expected.is_some())] += 1;
            }
        }
        assert!(found.iter().all(|&n| n > 10_000), "{found:?}");
    }
}
