//! The planner against an oracle that shares no code with it.
//!
//! The oracle knows nothing about masks and spans. It cuts a cluster at every place where something may change (subcluster
//! edges, ends of the payload and of what the plan writes) into ATOMS, so that each answer holds for every byte of an atom,
//! and then carries the plan out on a picture of the host cluster: a new one is full of garbage, one of our own holds its old
//! bytes and garbage under subclusters that are not allocated. What the guest reads afterwards is derived by the rules of
//! the specification alone. Positions never move (host and guest offset inside the cluster are equal), so an atom's value
//! is just what KIND of bytes it holds.
//!
//! The planner was broken by hand in these ways, one after another; this file alone caught each (the rule that failed):
//!
//! | break in `plan::write` | caught by |
//! |---|---|
//! | `last` is the subcluster of `payload.end`, not of the byte before | not just the needed subclusters are written |
//! | shared: not widened to the first allocated subcluster | allocated data is lost |
//! | shared: not widened to the last allocated subcluster | allocated data is lost |
//! | shared: last allocated subcluster taken from the trailing zeros | allocated data is lost |
//! | shared: widened to zero subclusters too | not just the needed subclusters are written |
//! | compressed: only touched subclusters are copied | compressed data is lost |
//! | new: zero bits of written subclusters stay | D6: a subcluster both allocated and zero |
//! | new: zero bits of the others are dropped | a byte beside the payload reads differently |
//! | new: alloc bits of the old and the touched subclusters only | compressed data is lost |
//! | new: head (tail) of the edge subcluster is not filled | garbage is visible |
//! | old cluster released always; not if compressed | old cluster released iff left behind |
//! | in place: head (tail) of an unallocated subcluster not filled | garbage is visible |
//! | in place: zero subclusters count as allocated | garbage is visible |
//! | in place: tail filled if the FIRST subcluster is unallocated | allocated bytes beside the payload are written |
//! | in place: head filled although it is allocated | allocated bytes beside the payload are written |
//! | in place: filled from the start of the cluster | allocated bytes beside the payload are written |
//! | in place: zero bits of touched subclusters stay | D6: a subcluster both allocated and zero |
//! | in place: no new bits where only zero subclusters change | payload is not visible |
//! | in place: no new bits where the first subcluster is allocated | payload is not visible |
//! | in place: new bits always | next changes nothing |
//! | COPIED ignored: shared in place; ours into a new cluster | in place without COPIED; new although ours |
//! | `head()` from the start of the cluster; `tail()` empty | head (tail) is not io before (after) the payload |
//! | mask without its highest bit | masks_hold_just_their_subclusters |
//!
//! | break in `plan::read` and `plan::split` | caught by |
//! |---|---|
//! | allocated and zero are one kind; run's end counted from the span | a run goes on over a change of source |
//! | a run is one subcluster | a run ends before its source does |
//! | offset of the cluster, not of the byte; zero without host is unallocated | a run's first byte comes from elsewhere |
//! | data joined without a look at offsets; unallocated never joined | runs_of_neighbouring_clusters_... |
//! | pieces end at L2 tables; pieces ignore the place in the slice | pieces_end_just_where_an_l2_slice_does |

use qcow2::format::l2::{CompressedExtent, L2Entry};
use qcow2::format::{ClusterState, Geometry, GuestOffset, Host, HostCluster, HostOffset};
use qcow2::plan::read::{Run, Source, continues, run_at};
use qcow2::plan::write::{Target, WritePlan, plan_compressed, plan_write};
use qcow2::plan::{Span, split, subcluster_mask};

/// What the guest finds in an atom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    /// Bytes of the request.
    Payload,
    /// Bytes of the host cluster that the entry had.
    OldHost,
    /// Bytes of the compressed cluster that the entry had.
    Decompressed,
    /// Bytes of the backing file.
    Backing,
    Zero,
    /// Bytes that no guest may ever see.
    Garbage,
}

/// What an entry says about one subcluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Alloc,
    Zero,
    Unallocated,
}

const KINDS: [Kind; 3] = [Kind::Alloc, Kind::Zero, Kind::Unallocated];
const OURS: Host = Host::Cluster { cluster: HostCluster(5), copied: true };
const SHARED: Host = Host::Cluster { cluster: HostCluster(5), copied: false };
const COMPRESSED: Host =
    Host::Compressed(CompressedExtent { offset: HostOffset(0x50_040b), length_bytes: 3 * 512 - 0x0b });

/// A cluster and a range of it, with sizes of its own rather than the ones that the planner asks `Geometry` for.
#[derive(Debug, Clone, Copy)]
struct Case {
    geometry: Geometry,
    state: ClusterState,
    span: Span,
    count: usize,
    subcluster_bytes: u64,
}

fn geometry(cluster_bits: u32, extended_l2: bool) -> Geometry {
    Geometry { version: 3, cluster_bits, extended_l2, refcount_order: 4 }
}

impl Case {
    fn new(geometry: Geometry, state: ClusterState, start: u64, end: u64) -> Self {
        let count = if geometry.extended_l2 { 32 } else { 1 };
        let subcluster_bytes = 2u64.pow(geometry.cluster_bits) / count as u64;
        Self { geometry, state, span: Span { start, end }, count, subcluster_bytes }
    }

    fn cluster_bytes(&self) -> u64 {
        self.subcluster_bytes * self.count as u64
    }

    fn kind(&self, subcluster: usize) -> Kind {
        kind_in(self.state.alloc, self.state.zero, subcluster)
    }

    /// Whether the request touches any byte of a subcluster.
    fn touches(&self, subcluster: usize) -> bool {
        let start = subcluster as u64 * self.subcluster_bytes;
        self.span.start < start + self.subcluster_bytes && start < self.span.end
    }

    /// What the guest sees in a subcluster before the write.
    fn before(&self, subcluster: usize) -> Value {
        match (self.state.host, self.kind(subcluster)) {
            (Host::Compressed(_), _) => Value::Decompressed,
            (_, Kind::Alloc) => Value::OldHost,
            (_, Kind::Zero) => Value::Zero,
            (_, Kind::Unallocated) => Value::Backing,
        }
    }

    /// Which subclusters a new host cluster must hold as a whole.
    fn must_move(&self) -> [bool; 32] {
        let needed = |s: usize| match self.state.host {
            Host::Compressed(_) => true,
            Host::Cluster { .. } => self.touches(s) || self.kind(s) == Kind::Alloc,
            Host::None => self.touches(s),
        };
        // One contiguous write: also the holes, which have something that is needed on either side.
        let (mut before, mut after) = ([false; 32], [false; 32]);
        for (s, n) in (0..self.count).zip((0..self.count).rev()) {
            before[s] = needed(s) || s > 0 && before[s - 1];
            after[n] = needed(n) || n < 31 && after[n + 1];
        }
        std::array::from_fn(|s| before[s] && after[s])
    }
}

fn kind_in(alloc: u32, zero: u32, subcluster: usize) -> Kind {
    match (alloc >> subcluster & 1, zero >> subcluster & 1) {
        (0, 0) => Kind::Unallocated,
        (0, _) => Kind::Zero,
        (_, 0) => Kind::Alloc,
        _ => panic!("the oracle was given a subcluster that is both"),
    }
}

/// A state from a kind per subcluster; `None` where the format has no such entry.
fn state_of(host: Host, extended: bool, kind: impl Fn(usize) -> Kind) -> Option<ClusterState> {
    let mut state = ClusterState { host, alloc: 0, zero: 0 };
    for subcluster in 0..if extended { 32 } else { 1 } {
        match (kind(subcluster), host) {
            (Kind::Unallocated, Host::Cluster { .. }) if !extended => return None,
            (Kind::Unallocated, _) => {}
            (_, Host::Compressed(_)) | (Kind::Alloc, Host::None) => return None,
            (Kind::Alloc, _) => state.alloc |= 1 << subcluster,
            (Kind::Zero, _) => state.zero |= 1 << subcluster,
        }
    }
    Some(state)
}

/// Calls `visit(subcluster, start, end)` for each atom of the cluster: cut at subcluster edges and at `cuts`.
fn for_atoms<E>(case: &Case, cuts: [u64; 4], mut visit: impl FnMut(usize, Span) -> Result<(), E>) -> Result<(), E> {
    let mut start = 0;
    for subcluster in 0..case.count {
        let edge = (subcluster as u64 + 1) * case.subcluster_bytes;
        while start < edge {
            let mut end = edge;
            for cut in cuts {
                if cut > start && cut < end {
                    end = cut;
                }
            }
            visit(subcluster, Span { start, end })?;
            start = end;
        }
    }
    Ok(())
}

fn holds(outer: Span, inner: Span) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

fn must(condition: bool, name: &'static str) -> Result<(), &'static str> {
    if condition { Ok(()) } else { Err(name) }
}

/// Carries out and judges a plan. The error names the rule that is broken.
fn judge_write(case: &Case, plan: &WritePlan) -> Result<(), &'static str> {
    let whole = Span { start: 0, end: case.cluster_bytes() };
    must(plan.payload == case.span, "payload is another range than the request")?;
    must(holds(whole, plan.io) && holds(plan.io, plan.payload), "io does not lie around the payload, in the cluster")?;
    must(plan.head() == Span { start: plan.io.start, end: plan.payload.start }, "head is not io before the payload")?;
    must(plan.tail() == Span { start: plan.payload.end, end: plan.io.end }, "tail is not io after the payload")?;
    must(plan.is_pure_overwrite() == plan.next.is_none(), "pure overwrite iff no bits change")?;

    let in_place = match plan.target {
        Target::InPlace(cluster) => {
            must(Host::Cluster { cluster, copied: true } == case.state.host, "in place without COPIED, or elsewhere")?;
            true
        }
        Target::New => {
            must(case.state.host != OURS, "new cluster although the old one is ours")?;
            must(plan.next.is_some(), "a new cluster is never linked")?;
            false
        }
    };
    must(plan.releases_old == (!in_place && case.state.host != Host::None), "old cluster released iff left behind")?;

    let (alloc, zero) = plan.next.map_or((case.state.alloc, case.state.zero), |bits| (bits.alloc, bits.zero));
    must(alloc & zero == 0, "D6: a subcluster both allocated and zero")?;
    must((u64::from(alloc) | u64::from(zero)) >> case.count == 0, "D6: bits of subclusters that do not exist")?;
    must(
        plan.next.is_none() || (alloc, zero) != (case.state.alloc, case.state.zero) || !in_place,
        "next changes nothing",
    )?;
    let moves = if in_place { [false; 32] } else { case.must_move() };
    for_atoms(case, [plan.io.start, plan.io.end, case.span.start, case.span.end], |subcluster, atom| {
        judge_reading(case, plan, in_place, kind_in(alloc, zero, subcluster), subcluster, atom)?;
        judge_effort(case, plan, (!in_place).then_some(&moves), kind_in(alloc, zero, subcluster), subcluster, atom)
    })
}

/// What the guest reads after the write.
fn judge_reading(
    case: &Case,
    plan: &WritePlan,
    in_place: bool,
    kind: Kind,
    subcluster: usize,
    atom: Span,
) -> Result<(), &'static str> {
    let before = case.before(subcluster);
    let content = if holds(plan.payload, atom) {
        Value::Payload
    } else if holds(plan.head(), atom) || holds(plan.tail(), atom) {
        before
    } else if in_place && before == Value::OldHost {
        Value::OldHost
    } else {
        Value::Garbage
    };
    let after = match kind {
        Kind::Alloc => content,
        Kind::Zero => Value::Zero,
        Kind::Unallocated => Value::Backing,
    };
    if holds(case.span, atom) {
        return must(after == Value::Payload, "payload is not visible");
    }
    must(after != Value::Garbage, "garbage is visible")?;
    must(before != Value::OldHost || after == Value::OldHost, "allocated data is lost")?;
    must(before != Value::Decompressed || after == Value::Decompressed, "compressed data is lost")?;
    must(after == before, "a byte beside the payload reads differently")
}

/// Whether no more was done than has to be. `moves`: what a new host cluster must hold; `None` if in place.
fn judge_effort(
    case: &Case,
    plan: &WritePlan,
    moves: Option<&[bool; 32]>,
    kind: Kind,
    subcluster: usize,
    atom: Span,
) -> Result<(), &'static str> {
    let was = case.kind(subcluster);
    let is_written = holds(plan.io, atom);
    if let Some(moves) = moves {
        must(is_written == moves[subcluster], "new cluster: not just the needed subclusters are written")?;
        let expected = if moves[subcluster] { Kind::Alloc } else { was };
        return must(kind == expected, "new cluster: bits of a subcluster are wrong");
    }
    let is_filled = is_written && !holds(case.span, atom);
    must(!is_filled || was != Kind::Alloc, "in place: allocated bytes beside the payload are written")?;
    must(!is_filled || case.touches(subcluster), "in place: more than the edge subclusters is filled")?;
    let expected = if case.touches(subcluster) { Kind::Alloc } else { was };
    must(kind == expected, "in place: bits of a subcluster are wrong")
}

#[track_caller]
fn check_write(case: &Case, seed: Option<u64>) {
    let plan = plan_write(case.geometry, case.state, case.span);
    if let Err(rule) = judge_write(case, &plan) {
        panic!("{rule}\n  seed {seed:x?}\n  {case:x?}\n  {plan:x?}");
    }
}

/// Where one byte comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Data(u64),
    Zero(Option<u64>),
    Unallocated(Option<u64>),
    Compressed(u64),
}

fn place(case: &Case, byte: u64) -> Place {
    let host = match case.state.host {
        Host::Compressed(extent) => return Place::Compressed(extent.offset.0),
        Host::Cluster { cluster, .. } => Some(cluster.0 * case.cluster_bytes() + byte),
        Host::None => None,
    };
    match case.kind((byte / case.subcluster_bytes) as usize) {
        Kind::Alloc => Place::Data(host.expect("allocated implies a host cluster")),
        Kind::Zero => Place::Zero(host),
        Kind::Unallocated => Place::Unallocated(host),
    }
}

/// Whether a byte that comes from `next` can share a transfer with the byte before it, which comes from `byte`.
fn one_transfer(byte: Place, next: Place) -> bool {
    match (byte, next) {
        (Place::Data(a), Place::Data(b)) => a + 1 == b,
        (Place::Zero(a), Place::Zero(b)) | (Place::Unallocated(a), Place::Unallocated(b)) => a.map(|a| a + 1) == b,
        _ => false,
    }
}

fn place_of(source: Source) -> Place {
    match source {
        Source::Data(HostOffset(offset)) => Place::Data(offset),
        Source::Zero(host) => Place::Zero(host.map(|offset| offset.0)),
        Source::Unallocated(host) => Place::Unallocated(host.map(|offset| offset.0)),
        Source::Compressed(extent) => Place::Compressed(extent.offset.0),
    }
}

/// Walks the runs of a case: they must tile it, each of one kind and as long as it can be. Returns the last one.
#[track_caller]
fn check_runs(case: &Case, seed: Option<u64>) -> Run {
    let mut start = case.span.start;
    loop {
        let run = run_at(case.geometry, case.state, Span { start, end: case.span.end });
        let end = start + run.length_bytes;
        let fail = |rule: &str| panic!("{rule}\n  seed {seed:x?}\n  {case:x?}\n  at 0x{start:x}: {run:x?}");
        if run.length_bytes == 0 || end > case.span.end {
            fail("a run is empty or leaves the range");
        }
        if place_of(run.source) != place(case, start) {
            fail("a run's first byte comes from elsewhere");
        }
        if let (Source::Compressed(extent), Host::Compressed(old)) = (run.source, case.state.host)
            && extent != old
        {
            fail("a run has another compressed extent");
        }
        // Inside a subcluster nothing changes: looking at both sides of each edge is looking at each byte.
        let mut edge = start - start % case.subcluster_bytes + case.subcluster_bytes;
        while edge < end {
            let is_compressed = matches!(case.state.host, Host::Compressed(_));
            if !is_compressed && !one_transfer(place(case, edge - 1), place(case, edge)) {
                fail("a run goes on over a change of source");
            }
            edge += case.subcluster_bytes;
        }
        if end == case.span.end {
            return run;
        }
        if !end.is_multiple_of(case.subcluster_bytes) || one_transfer(place(case, end - 1), place(case, end)) {
            fail("a run ends before its source does");
        }
        let next = run_at(case.geometry, case.state, Span { start: end, end: case.span.end });
        if continues(&run, &next) {
            fail("neighbours of different sources are one transfer");
        }
        start = end;
    }
}

/// All 3^5 states of five subclusters, the others all of one kind; all ranges of half subclusters.
#[track_caller]
fn exhaust(host: Host, cluster_bits: u32, window: [usize; 5], check: impl Fn(&Case)) {
    let geometry = geometry(cluster_bits, true);
    let half = 2u64.pow(cluster_bits) / 64;
    for others in KINDS {
        for code in 0..243usize {
            let kind = |subcluster: usize| match window.iter().position(|&s| s == subcluster) {
                Some(place) => KINDS[code / 3usize.pow(place as u32) % 3],
                None => others,
            };
            let Some(state) = state_of(host, true, kind) else { continue };
            for start in 0..64 {
                for end in start + 1..=64 {
                    check(&Case::new(geometry, state, start * half, end * half));
                }
            }
        }
    }
}

const FIRST: [usize; 5] = [0, 1, 2, 3, 4];
const MIDDLE: [usize; 5] = [13, 14, 15, 16, 17];
const LAST: [usize; 5] = [27, 28, 29, 30, 31];
const ENDS: [usize; 5] = [0, 1, 15, 30, 31];

#[test]
fn writes_into_no_cluster_and_into_a_compressed_one() {
    for (bits, window) in [(14, FIRST), (16, MIDDLE), (17, LAST), (21, ENDS)] {
        exhaust(Host::None, bits, window, |case| check_write(case, None));
        exhaust(COMPRESSED, bits, window, |case| check_write(case, None));
    }
}

#[test]
fn writes_into_our_cluster() {
    for (bits, window) in [(14, FIRST), (16, MIDDLE), (17, LAST), (21, ENDS)] {
        exhaust(OURS, bits, window, |case| check_write(case, None));
    }
}

#[test]
fn writes_into_a_shared_cluster() {
    for (bits, window) in [(14, FIRST), (16, MIDDLE), (17, LAST), (21, ENDS)] {
        exhaust(SHARED, bits, window, |case| check_write(case, None));
    }
}

#[test]
fn reads_of_every_state_and_range() {
    for host in [Host::None, OURS, COMPRESSED] {
        for (bits, window) in [(14, MIDDLE), (21, ENDS)] {
            exhaust(host, bits, window, |case| {
                check_runs(case, None);
            });
        }
    }
}

#[test]
fn standard_cluster_every_state_and_every_byte_range() {
    let mut states = 0;
    for host in [Host::None, OURS, SHARED, COMPRESSED] {
        for kind in KINDS {
            let Some(state) = state_of(host, false, |_| kind) else { continue };
            states += 1;
            for start in 0..512 {
                for end in start + 1..=512 {
                    let case = Case::new(geometry(9, false), state, start, end);
                    check_write(&case, None);
                    check_runs(&case, None);
                }
            }
        }
    }
    assert_eq!(states, 7, "none: 2, ours: 2, shared: 2, compressed: 1");
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

    fn geometry(&mut self) -> Geometry {
        let extended = self.below(4) != 0;
        let smallest = if extended { 14 } else { 9 };
        geometry(smallest + self.below(u64::from(22 - smallest)) as u32, extended)
    }

    fn state(&mut self, extended: bool) -> ClusterState {
        let cluster = HostCluster(1 + self.below(1 << 20));
        let (kinds, usual, odd) = (self.next(), self.below(3) as usize, 1 + self.below(31));
        loop {
            let host = match self.below(8) {
                0 | 1 => Host::None,
                2..=4 => Host::Cluster { cluster, copied: true },
                5 | 6 => Host::Cluster { cluster, copied: false },
                _ => COMPRESSED,
            };
            let mut bits = Random(kinds);
            let kinds: Vec<Kind> = (0..32)
                .map(|_| match host {
                    Host::Compressed(_) => Kind::Unallocated,
                    // Nothing can be allocated without a host cluster.
                    Host::None if bits.below(32) < odd => Kind::Zero,
                    Host::None => Kind::Unallocated,
                    _ if bits.below(32) < odd => KINDS[bits.below(3) as usize],
                    _ => KINDS[usual],
                })
                .collect();
            if let Some(state) = state_of(host, extended, |subcluster| kinds[subcluster]) {
                return state;
            }
        }
    }

    /// A position in `0..=size`: anywhere, or within a byte of a subcluster edge.
    fn position(&mut self, size: u64, subcluster_bytes: u64) -> u64 {
        if self.below(2) == 0 {
            return self.below(size + 1);
        }
        let edge = self.below(size / subcluster_bytes + 1) * subcluster_bytes;
        (edge + self.below(3)).saturating_sub(1).min(size)
    }

    fn case(&mut self) -> Case {
        let geometry = self.geometry();
        let state = self.state(geometry.extended_l2);
        let mut case = Case::new(geometry, state, 0, 0);
        while case.span.start == case.span.end {
            let a = self.position(case.cluster_bytes(), case.subcluster_bytes);
            let b = self.position(case.cluster_bytes(), case.subcluster_bytes);
            case.span = Span { start: a.min(b), end: a.max(b) };
        }
        case
    }
}

#[test]
fn a_million_random_cases_of_32_subclusters_and_byte_ranges() {
    for seed in 0..1_200_000 {
        let case = Random(seed).case();
        check_write(&case, Some(seed));
        check_runs(&case, Some(seed));
    }
}

#[test]
fn runs_of_neighbouring_clusters_are_joined_where_their_bytes_follow_each_other() {
    let mut joined = 0;
    for seed in 0..300_000 {
        let mut random = Random(seed);
        let geometry = random.geometry();
        let cluster_bytes = 2u64.pow(geometry.cluster_bits);
        let (mut left, mut right) = (random.state(geometry.extended_l2), random.state(geometry.extended_l2));
        // Mostly close to each other: behind, the same, before, elsewhere.
        for (state, cluster) in [(&mut left, 7), (&mut right, 5 + random.below(4))] {
            if let Host::Cluster { cluster: place, .. } = &mut state.host {
                *place = HostCluster(cluster);
            }
        }
        let left = Case::new(geometry, left, random.below(cluster_bytes), cluster_bytes);
        let right = Case::new(geometry, right, 0, 1 + random.below(cluster_bytes));
        let run = check_runs(&left, Some(seed));
        let next = run_at(geometry, right.state, right.span);
        let expected = one_transfer(place(&left, cluster_bytes - 1), place(&right, 0));
        assert_eq!(continues(&run, &next), expected, "seed {seed:x}\n  {left:x?}\n  {right:x?}");
        joined += u32::from(expected);
    }
    assert!(joined > 10_000, "hardly any pair could be joined: {joined}");
}

/// Splitting tiles a range into pieces of one slice each; found by walking from cluster to cluster.
#[test]
fn pieces_end_just_where_an_l2_slice_does() {
    let slice_of = |geometry: Geometry, byte: u64| {
        let entry_bytes = if geometry.extended_l2 { 16 } else { 8 };
        let entries = 2u64.pow(geometry.cluster_bits).min(4096) / entry_bytes;
        byte / 2u64.pow(geometry.cluster_bits) / entries
    };
    for seed in 0..20_000 {
        let mut random = Random(seed);
        let geometry = random.geometry();
        let cluster_bytes = 2u64.pow(geometry.cluster_bits);
        let mut at = random.position(cluster_bytes << 12, cluster_bytes);
        let end = at + random.position(cluster_bytes << 10, cluster_bytes);
        while at < end {
            let mut piece_end = end.min(at - at % cluster_bytes + cluster_bytes);
            while piece_end < end && slice_of(geometry, piece_end) == slice_of(geometry, at) {
                piece_end = end.min(piece_end + cluster_bytes);
            }
            let piece = split(geometry, GuestOffset(at), end - at);
            assert_eq!(piece, piece_end - at, "seed {seed:x} at 0x{at:x} of 0x{end:x}: {geometry:?}");
            at += piece;
        }
    }
}

#[test]
fn masks_hold_just_their_subclusters() {
    for first in 0..32u32 {
        for last in first..32 {
            let mask = subcluster_mask(first, last);
            assert!((0..32).all(|bit| (mask >> bit & 1 == 1) == (first <= bit && bit <= last)), "{first}..={last}");
        }
    }
}

/// Whatever was there, the new extent is all that is left, in an entry with neither COPIED nor a bitmap; and what the
/// entry referred to is let go, if it did to anything.
#[test]
fn a_compressed_write_replaces_every_state() {
    let extent = CompressedExtent::new(HostOffset(0x70_1234), 5000);
    for (extended, host) in
        [false, true].into_iter().flat_map(|e| [Host::None, OURS, SHARED, COMPRESSED].map(|h| (e, h)))
    {
        for kinds in KINDS.into_iter().flat_map(|first| KINDS.map(|others| [first, others])) {
            let Some(old) = state_of(host, extended, |subcluster| kinds[subcluster.min(1)]) else { continue };
            let (new, releases) = plan_compressed(old, extent);
            assert_eq!(new, ClusterState { host: Host::Compressed(extent), alloc: 0, zero: 0 });
            assert_eq!(releases, host != Host::None, "{old:?}");
            let entry = L2Entry::encode(new, geometry(16, extended));
            assert_eq!((entry.descriptor >> 62, entry.bitmap), (1, 0));
            assert_eq!(entry.decode(geometry(16, extended)), Ok(new));
        }
    }
}
