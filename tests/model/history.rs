//! What a disk may read while many change it at once: every change with the times when it began and ended. A change that
//! had ended before another began, which has ended too, is not seen any more. Of changes that were under way together,
//! each byte shows one.

/// Something that was done to a range of bytes.
struct Change {
    from: usize,
    content: Vec<u8>,
    began: u64,
    ended: Option<u64>,
    /// It was refused on its way, or may be done in part: each byte of it is there or not.
    in_part: bool,
}

/// A change that has begun.
#[derive(Clone, Copy)]
pub struct Begun(usize);

/// The disk as it was when nothing was under way, and the changes since. Time is a counter that moves at each call.
pub struct History {
    base: Vec<u8>,
    changes: Vec<Change>,
    now: u64,
}

impl History {
    pub fn new(base: Vec<u8>) -> Self {
        Self { base, changes: Vec::new(), now: 0 }
    }

    pub fn now(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    pub fn begin(&mut self, from: u64, content: Vec<u8>) -> Begun {
        assert!(from as usize + content.len() <= self.base.len());
        let began = self.now();
        self.changes.push(Change { from: from as usize, content, began, ended: None, in_part: false });
        Begun(self.changes.len() - 1)
    }

    pub fn end(&mut self, change: Begun, in_part: bool) {
        let ended = Some(self.now());
        let change = &mut self.changes[change.0];
        (change.ended, change.in_part) = (ended, in_part);
    }

    /// What a read from `began` until now found: the first byte that nothing explains.
    pub fn unexplained(&self, from: u64, found: &[u8], began: u64) -> Option<u64> {
        let (from, end) = (from as usize, from as usize + found.len());
        let met: Vec<&Change> = self.changes.iter().filter(|c| c.from < end && from < c.end()).collect();
        let mut cuts: Vec<usize> =
            met.iter().flat_map(|c| [c.from, c.end()]).filter(|&at| from < at && at < end).collect();
        cuts.extend([from, end]);
        cuts.sort_unstable();
        cuts.windows(2)
            .find_map(|cut| self.unexplained_between(&met, cut[0], &found[cut[0] - from..cut[1] - from], began))
    }

    /// As [`Self::unexplained`], for a range that each change covers as a whole or not at all.
    fn unexplained_between(&self, met: &[&Change], from: usize, found: &[u8], began: u64) -> Option<u64> {
        let end = from + found.len();
        let covering = || met.iter().filter(|c| c.from <= from && end <= c.end());
        // Whatever had ended before this is covered for good.
        let hides = |c: &&&Change| !c.in_part && c.ended.is_some_and(|at| at < began);
        let covered = covering().filter(hides).map(|c| c.began).max().unwrap_or(0);
        let seen = covering().filter(|c| c.ended.is_none_or(|at| at > covered));
        let mut allowed: Vec<&[u8]> = seen.map(|c| &c.content[from - c.from..end - c.from]).collect();
        if covered == 0 {
            allowed.push(&self.base[from..end]);
        }
        if allowed.contains(&found) {
            return None;
        }
        (0..found.len()).find(|&i| allowed.iter().all(|content| content[i] != found[i])).map(|i| (from + i) as u64)
    }

    /// The changes that met at a byte, for messages: when each began and ended, from where to where, and what it left.
    pub fn told(&self, at: u64) -> Vec<String> {
        let at = at as usize;
        let met = self.changes.iter().filter(|c| c.from <= at && at < c.end());
        let told = |c: &Change| {
            let (end, left) = (c.end(), c.content[at - c.from]);
            format!("{}..{:?}: 0x{left:02x} in {}..{end}, in part: {}", c.began, c.ended, c.from, c.in_part)
        };
        met.map(told).chain([format!("before: 0x{:02x}", self.base[at])]).collect()
    }

    /// Nothing is under way, and this is what the disk reads.
    pub fn settle(&mut self, found: &[u8]) {
        assert!(self.changes.iter().all(|change| change.ended.is_some()));
        self.base.copy_from_slice(found);
        self.changes.clear();
    }

    /// How often a byte may be more than one thing.
    pub fn overlaps(&self) -> usize {
        let overlap = |a: &Change, b: &Change| {
            let at_once = a.ended.is_none_or(|at| at > b.began) && b.ended.is_none_or(|at| at > a.began);
            at_once && a.from < b.end() && b.from < a.end()
        };
        let earlier = |i: usize| self.changes[..i].iter().filter(move |a| overlap(a, &self.changes[i])).count();
        (0..self.changes.len()).map(earlier).sum()
    }
}

impl Change {
    fn end(&self) -> usize {
        self.from + self.content.len()
    }
}

#[test]
fn a_history_refuses_what_no_order_of_the_changes_explains() {
    let mut history = History::new(vec![0; 8]);
    let first = history.begin(0, vec![1; 4]);
    history.end(first, false);
    let (second, third) = (history.begin(2, vec![2; 4]), history.begin(3, vec![3; 4]));
    let began = history.now();
    // While they are under way, or if the read began before they ended, each is there or not.
    for _ in 0..2 {
        for right in [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 2, 3, 2, 3, 0, 0], [1, 1, 1, 2, 3, 0, 3, 0]] {
            assert_eq!(history.unexplained(0, &right, began), None, "{right:?}");
        }
        assert_eq!(history.unexplained(0, &[0, 1, 1, 1, 0, 0, 0, 0], began), Some(0), "the first had ended");
        assert_eq!(history.unexplained(2, &[1, 1, 1], began), Some(4), "nobody wrote that there");
        if history.changes[1].ended.is_none() {
            history.end(second, false);
            history.end(third, false);
        }
    }
    let later = history.now();
    assert_eq!(history.unexplained(0, &[1, 1, 2, 3, 2, 3, 3, 0], later), None, "in either order");
    assert_eq!(history.unexplained(0, &[1, 1, 2, 1, 2, 3, 3, 0], later), Some(3), "both are lost");
    let fourth = history.begin(0, vec![4; 8]);
    history.end(fourth, true);
    let later = history.now();
    for right in [[1, 1, 2, 3, 2, 3, 3, 0], [4, 1, 2, 3, 4, 4, 4, 4]] {
        assert_eq!(history.unexplained(0, &right, later), None, "it was refused in the middle");
    }
    assert_eq!(history.overlaps(), 1);
    history.settle(&[4; 8]);
    assert_eq!(history.unexplained(0, &[4, 4, 1], later), Some(2));
}
