//! The plans of writing zeroes and of discarding against an oracle that shares no code with them.
//!
//! The oracle has no masks: a cluster is a row of units (its subclusters, or itself), each with a KIND in its entry and
//! a VALUE that the guest reads there, by the rules of the specification. A plan is carried out on that row. Then each
//! unit is asked what the guest reads there before and after, and the row as a whole whether any entry of the format
//! could have said what was wanted: where one can, "write zeroes as data" is a wrong answer, where none can, any entry
//! is.
//!
//! `plan::zero` was broken by hand in these ways, one after another; this file alone caught each. Named is the test that
//! failed or, of the tests that go through every state, the rule, and whether of subclusters, standard clusters or both:
//!
//! | break | caught by |
//! |---|---|
//! | cover: the first one counts as whole although it is cut | `spans_cover_what_counting_bytes_says` |
//! | cover: the last one is that of the end, not of the byte before | `spans_cover_what_counting_bytes_says` |
//! | cover: a single one that is cut at its end only | `spans_cover_what_counting_bytes_says` |
//! | cover: tail also where it is the head | `spans_cover_what_counting_bytes_says` |
//! | edge: compressed data looked at by its bits | `edges_of_every_state` |
//! | edge: what is unallocated is always written | `edges_of_every_state` |
//! | edge: zero counts as unallocated | `edges_of_every_state` |
//! | zero: alloc bits stay | D6: a unit is both allocated and zero (both) |
//! | zero: zero bits of the others are dropped | a unit beside the request reads differently (subclusters) |
//! | zero: compressed data covered in part becomes zero | an entry where only data can say it (subclusters) |
//! | zero, version 2: let go although something lies below | an entry where only data can say it (standard clusters) |
//! | zero, version 2: let go although it may not | an entry where only data can say it (standard clusters) |
//! | zero, version 2: unallocated counts as zero over a backing file | an entry where only data can say it (standard clusters) |
//! | zero: the host cluster goes without may_unmap | the host cluster stays iff it is needed (both) |
//! | zero: the host cluster goes only if all of it is zero | the host cluster stays iff it is needed (subclusters) |
//! | zero: the host cluster goes as soon as it may | D6: the format has no such entry (subclusters) |
//! | discard: zero bits always | bits of a unit change that reads as before (both) |
//! | discard: zero bits only for what was allocated | a wanted unit does not read as zeroes, though an entry could say it (both) |
//! | discard: zero bits only over a backing file | a dropped unit has no zero bit (both) |
//! | discard: the host cluster stays | the host cluster stays iff something of it is left (both) |
//! | discard: the host cluster goes only if all of it is zero | the host cluster stays iff something of it is left (subclusters) |
//! | discard, version 2: over a backing file too | a unit that cannot be dropped reads differently (standard clusters) |
//! | discard: compressed data covered in part goes | a unit that cannot be dropped reads differently (subclusters) |
//! | both: compressed data that is left behind is not released | what the entry left behind is not released (both) |
//! | both: an entry that stays the same is written | an entry that is the old one is not unchanged (both) |

use qcow2::format::l2::CompressedExtent;
use qcow2::format::{ClusterState, Geometry, Host, HostCluster, HostOffset};
use qcow2::plan::Span;
use qcow2::plan::zero::{Cover, Edge, Outcome, cover, plan_discard, plan_edge, plan_zero};

/// What an entry says about one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Alloc,
    Zero,
    Unallocated,
}

/// What the guest reads in one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Host,
    Decompressed,
    Backing,
    Zero,
}

const KINDS: [Kind; 3] = [Kind::Alloc, Kind::Zero, Kind::Unallocated];
const OURS: Host = Host::Cluster { cluster: HostCluster(5), copied: true };
const SHARED: Host = Host::Cluster { cluster: HostCluster(5), copied: false };
const COMPRESSED: Host = Host::Compressed(CompressedExtent { offset: HostOffset(0x50_040b), length_bytes: 1525 });

/// The window of units that take all kinds, and the size of the cluster.
const PLACES: [([usize; 5], u32); 2] = [([13, 14, 15, 16, 17], 16), ([0, 1, 15, 30, 31], 21)];

fn extended(cluster_bits: u32) -> Geometry {
    Geometry { version: 3, cluster_bits, extended_l2: true, refcount_order: 4 }
}

fn standard(version: u32, cluster_bits: u32) -> Geometry {
    Geometry { version, cluster_bits, extended_l2: false, refcount_order: 4 }
}

fn units(geometry: Geometry) -> usize {
    if geometry.extended_l2 { 32 } else { 1 }
}

fn unit_bytes(geometry: Geometry) -> u64 {
    2u64.pow(geometry.cluster_bits) / units(geometry) as u64
}

fn kind(state: ClusterState, unit: usize) -> Kind {
    match (state.alloc >> unit & 1, state.zero >> unit & 1) {
        (0, 0) => Kind::Unallocated,
        (0, _) => Kind::Zero,
        (_, 0) => Kind::Alloc,
        _ => panic!("D6: a unit is both allocated and zero"),
    }
}

/// `below_is_zero`: nothing lies below, so that what is unallocated reads as zeroes.
fn value(state: ClusterState, unit: usize, below_is_zero: bool) -> Value {
    match (state.host, kind(state, unit)) {
        (Host::Compressed(_), _) => Value::Decompressed,
        (_, Kind::Alloc) => Value::Host,
        (_, Kind::Zero) => Value::Zero,
        (_, Kind::Unallocated) if below_is_zero => Value::Zero,
        (_, Kind::Unallocated) => Value::Backing,
    }
}

/// A state from a kind per unit; `None` where the format has no such entry.
fn state_of(geometry: Geometry, host: Host, kind: impl Fn(usize) -> Kind) -> Option<ClusterState> {
    let mut state = ClusterState { host, alloc: 0, zero: 0 };
    for unit in 0..units(geometry) {
        match kind(unit) {
            Kind::Alloc => state.alloc |= 1 << unit,
            Kind::Zero => state.zero |= 1 << unit,
            Kind::Unallocated => {}
        }
    }
    is_legal(geometry, state).then_some(state)
}

/// Whether the format has such an entry.
fn is_legal(geometry: Geometry, state: ClusterState) -> bool {
    let none_of = |bits: u32| bits == 0;
    (geometry.version >= 3 || none_of(state.zero))
        && (u64::from(state.alloc) | u64::from(state.zero)) >> units(geometry) == 0
        && match state.host {
            Host::None => none_of(state.alloc),
            Host::Compressed(_) => none_of(state.alloc) && none_of(state.zero),
            Host::Cluster { .. } => geometry.extended_l2 || !none_of(state.alloc) || !none_of(state.zero),
        }
}

/// All states in which five units take all kinds and the others are of one kind.
fn states(geometry: Geometry, window: [usize; 5]) -> Vec<ClusterState> {
    let mut all = Vec::new();
    for host in [Host::None, OURS, SHARED, COMPRESSED] {
        for others in KINDS {
            for code in 0..243usize {
                let kind = |unit: usize| match window.iter().position(|&u| u == unit) {
                    Some(place) => KINDS[code / 3usize.pow(place as u32) % 3],
                    None => others,
                };
                all.extend(state_of(geometry, host, kind));
            }
        }
    }
    all
}

/// All states of a cluster that is one unit.
fn standard_states(geometry: Geometry) -> Vec<ClusterState> {
    let of_host = |host| KINDS.into_iter().filter_map(move |kind| state_of(geometry, host, |_| kind));
    [Host::None, OURS, SHARED, COMPRESSED].into_iter().flat_map(of_host).collect()
}

/// A request for the units of a mask.
#[derive(Debug, Clone, Copy)]
struct Case {
    geometry: Geometry,
    state: ClusterState,
    mask: u32,
    below_is_zero: bool,
}

impl Case {
    fn wants(&self, unit: usize) -> bool {
        self.mask >> unit & 1 == 1
    }

    fn before(&self, unit: usize) -> Value {
        value(self.state, unit, self.below_is_zero)
    }

    fn all(&self, holds: impl Fn(usize) -> bool) -> bool {
        (0..units(self.geometry)).all(holds)
    }

    /// Whether an entry without a host cluster can say: wanted units read as zeroes, the others as before.
    fn sayable_without_host(&self) -> bool {
        let has_zero_flag = self.geometry.version >= 3;
        self.all(|unit| match (self.wants(unit), self.before(unit)) {
            (true, _) | (false, Value::Zero) => has_zero_flag || self.below_is_zero,
            (false, Value::Backing) => true,
            (false, Value::Host | Value::Decompressed) => false,
        })
    }

    /// As `sayable_without_host`, with the host cluster or compressed data that the entry has.
    fn sayable_with_host(&self) -> bool {
        match self.state.host {
            Host::None => false,
            Host::Compressed(_) => !(0..units(self.geometry)).any(|unit| self.wants(unit)),
            Host::Cluster { .. } => self.geometry.version >= 3,
        }
    }

    /// The entry after a plan, after what has to hold for each.
    fn carry_out(&self, outcome: Outcome) -> Result<Option<ClusterState>, &'static str> {
        match outcome {
            Outcome::Unchanged => Ok(Some(self.state)),
            Outcome::Write => Ok(None),
            Outcome::Entry { state, releases } => {
                must(state != self.state, "an entry that is the old one is not unchanged")?;
                must(is_legal(self.geometry, state), "D6: the format has no such entry")?;
                must(state.host == self.state.host || state.host == Host::None, "the host cluster is another one")?;
                must(releases == (state.host != self.state.host), "what the entry left behind is not released")?;
                Ok(Some(state))
            }
        }
    }
}

fn must(condition: bool, rule: &'static str) -> Result<(), &'static str> {
    if condition { Ok(()) } else { Err(rule) }
}

fn judge_zero(case: &Case, may_unmap: bool, outcome: Outcome) -> Result<(), &'static str> {
    let may_go = may_unmap || !matches!(case.state.host, Host::Cluster { .. });
    let sayable = case.sayable_with_host() || may_go && case.sayable_without_host();
    let Some(after) = case.carry_out(outcome)? else { return must(!sayable, "data where an entry could say it") };
    must(sayable, "an entry where only data can say it")?;
    for unit in 0..units(case.geometry) {
        let reads = value(after, unit, case.below_is_zero);
        if case.wants(unit) {
            must(reads == Value::Zero, "a wanted unit does not read as zeroes")?;
            let has_bit = case.geometry.version < 3 || kind(after, unit) == Kind::Zero;
            must(has_bit, "a wanted unit has no zero bit")?;
        } else {
            must(reads == case.before(unit), "a unit beside the request reads differently")?;
            must(kind(after, unit) == kind(case.state, unit), "the bits of a unit beside the request change")?;
        }
    }
    let is_empty = case.all(|unit| kind(after, unit) != Kind::Alloc);
    let stays = after.host == case.state.host;
    match case.state.host {
        Host::None => Ok(()),
        Host::Compressed(_) => must(!stays, "compressed data of which nothing is left stays"),
        Host::Cluster { .. } => must(stays != (may_unmap && is_empty), "the host cluster stays iff it is needed"),
    }
}

fn judge_discard(case: &Case, outcome: Outcome) -> Result<(), &'static str> {
    let sayable = case.sayable_with_host() || case.sayable_without_host();
    let Some(after) = case.carry_out(outcome)? else { return Err("a discard never writes data") };
    for unit in 0..units(case.geometry) {
        let (was, reads) = (case.before(unit), value(after, unit, case.below_is_zero));
        if case.wants(unit) && sayable {
            must(reads == Value::Zero, "a wanted unit does not read as zeroes, though an entry could say it")?;
        } else {
            must(reads == was, "a unit that cannot be dropped reads differently")?;
        }
        // Nothing changes that does not have to; what was allocated gets its zero bit where there are any.
        let changes = kind(after, unit) != kind(case.state, unit);
        must(!changes || reads != was, "bits of a unit change that reads as before")?;
        let got_bit = kind(after, unit) == Kind::Zero || case.geometry.version < 3;
        must(!changes || got_bit, "a dropped unit has no zero bit")?;
    }
    let is_left = match case.state.host {
        Host::Compressed(_) => !sayable,
        _ => !case.all(|unit| kind(after, unit) != Kind::Alloc),
    };
    must((after.host != Host::None) == is_left, "the host cluster stays iff something of it is left")
}

#[track_caller]
fn check(case: &Case) {
    for may_unmap in [false, true] {
        let outcome = plan_zero(case.geometry, case.state, case.mask, may_unmap, case.below_is_zero);
        if let Err(rule) = judge_zero(case, may_unmap, outcome) {
            panic!("zero: {rule}\n  {case:x?}\n  may_unmap {may_unmap}\n  {outcome:x?}");
        }
    }
    let outcome = plan_discard(case.geometry, case.state, case.mask, case.below_is_zero);
    if let Err(rule) = judge_discard(case, outcome) {
        panic!("discard: {rule}\n  {case:x?}\n  {outcome:x?}");
    }
}

/// The mask of the units from `first` to `last`, one by one.
fn mask_of(first: usize, last: usize) -> u32 {
    (first..=last).map(|unit| 1 << unit).sum()
}

#[test]
fn every_state_and_every_run_of_subclusters() {
    for (window, bits) in PLACES {
        let geometry = extended(bits);
        for state in states(geometry, window) {
            for (first, last) in (0..32).flat_map(|first| (first..32).map(move |last| (first, last))) {
                for below_is_zero in [false, true] {
                    check(&Case { geometry, state, mask: mask_of(first, last), below_is_zero });
                }
            }
        }
    }
}

#[test]
fn every_state_of_a_standard_cluster_in_both_versions() {
    let mut count = [0; 4];
    for version in [2, 3] {
        let geometry = standard(version, 16);
        for state in standard_states(geometry) {
            count[version as usize] += 1;
            for below_is_zero in [false, true] {
                check(&Case { geometry, state, mask: 1, below_is_zero });
            }
        }
    }
    assert_eq!(count, [0, 0, 4, 7], "none, ours, shared, compressed; and zero, with none, ours and shared");
}

/// splitmix64: seeded, so that a failure can be repeated from what it printed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[test]
fn half_a_million_random_states_and_masks() {
    for seed in 0..500_000 {
        let mut random = Random(seed);
        let geometry = extended(14 + random.below(8) as u32);
        let host = [Host::None, OURS, SHARED, COMPRESSED][random.below(4) as usize];
        let (alloc, zero) = (random.next() as u32, (random.next() & random.next()) as u32);
        let state = match host {
            Host::None => ClusterState { host, alloc: 0, zero },
            Host::Compressed(_) => ClusterState { host, alloc: 0, zero: 0 },
            Host::Cluster { .. } => ClusterState { host, alloc: alloc & !zero, zero },
        };
        // Also masks that leave nothing, or hardly anything, of what is allocated.
        let mask = match random.below(4) {
            0 => u32::MAX,
            1 => state.alloc | 1,
            2 => state.alloc & !(1 << random.below(32)) | 1 << random.below(32),
            _ => random.next() as u32 | 1,
        };
        check(&Case { geometry, state, mask, below_is_zero: random.below(2) == 0 });
    }
}

/// Counts, unit by unit, how many of its bytes a span has.
#[track_caller]
fn check_cover(geometry: Geometry, start: u64, end: u64) {
    let size = unit_bytes(geometry);
    let (mut whole, mut parts, mut touched) = (Vec::new(), Vec::new(), Vec::new());
    for unit in 0..units(geometry) as u64 {
        let bytes = end.min((unit + 1) * size).saturating_sub(start.max(unit * size));
        match bytes {
            0 => continue,
            bytes if bytes == size => whole.push(unit),
            _ => parts.push(unit as u32),
        }
        touched.push(unit as u32);
    }
    let is_part = |unit: Option<&u32>| unit.copied().filter(|unit| parts.contains(unit));
    let head = is_part(touched.first());
    let tail = is_part(touched.last()).filter(|_| touched.len() > 1);
    let expected = Cover { whole: whole.iter().map(|unit| 1 << unit).sum(), head, tail };
    assert_eq!(cover(geometry, Span { start, end }), expected, "{start:#x}..{end:#x} of {geometry:?}");
    assert_eq!(head.into_iter().chain(tail).collect::<Vec<_>>(), parts, "a unit inside is covered in part");
}

#[test]
fn spans_cover_what_counting_bytes_says() {
    for geometry in [extended(14), extended(16), extended(21), standard(2, 9), standard(3, 16)] {
        let size = unit_bytes(geometry);
        // Around each edge of a unit, and in its middle.
        let near = |unit: u64| [unit * size, unit * size + 1, unit * size + size / 2, (unit + 1) * size - 1];
        let mut cuts: Vec<u64> = (0..units(geometry) as u64).flat_map(near).collect();
        cuts.push(units(geometry) as u64 * size);
        for (index, &start) in cuts.iter().enumerate() {
            for &end in &cuts[index + 1..] {
                check_cover(geometry, start, end);
            }
        }
    }
}

/// An edge is left alone iff it reads as zeroes, becomes zero if what lies below does, and is data otherwise.
#[test]
fn edges_of_every_state() {
    let standard = [2, 3].map(|version| (standard(version, 16), standard_states(standard(version, 16))));
    let windows = PLACES.map(|(window, bits)| (extended(bits), states(extended(bits), window)));
    for (geometry, states) in standard.into_iter().chain(windows) {
        for state in states {
            for unit in 0..units(geometry) {
                let expected = match value(state, unit, false) {
                    Value::Zero => Edge::Nothing,
                    Value::Backing => Edge::ZeroIfBelowIs,
                    Value::Host | Value::Decompressed => Edge::Write,
                };
                assert_eq!(plan_edge(state, unit as u32), expected, "unit {unit} of {state:x?}");
            }
        }
    }
}
