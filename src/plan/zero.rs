//! What writing zeroes to a cluster, or discarding a part of it, makes of its entry.
//!
//! Both work on whole subclusters. Zeroing sets zero bits and, if it may, lets go of a host cluster that holds nothing
//! any more; what is not a whole subcluster has to be written as data, unless the rest of the subcluster reads as
//! zeroes anyway ([`Edge`]). Discarding is advice: it drops what it can, and whatever it drops reads as zeroes
//! afterwards, never as what lies below in a backing file.

use super::{Span, subcluster_mask};
use crate::format::{ClusterState, Geometry, Host};

/// Subclusters of a cluster that a span covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cover {
    /// Those that are covered whole.
    pub whole: u32,
    /// The first one, if it is covered in part.
    pub head: Option<u32>,
    /// The last one, if it is covered in part and is not the same as `head`.
    pub tail: Option<u32>,
}

/// What `span` (not empty) covers.
pub fn cover(geometry: Geometry, span: Span) -> Cover {
    let size = geometry.subcluster_size_bytes();
    let (first, last) = (geometry.subcluster_of(span.start), geometry.subcluster_of(span.end - 1));
    let (cut_start, cut_end) = (!span.start.is_multiple_of(size), !span.end.is_multiple_of(size));
    let mut whole = subcluster_mask(first, last);
    let (mut head, mut tail) = (None, None);
    if cut_start || (first == last && cut_end) {
        head = Some(first);
        whole &= !(1 << first);
    }
    if cut_end && first != last {
        tail = Some(last);
        whole &= !(1 << last);
    }
    Cover { whole, head, tail }
}

/// What is to be done about a subcluster that is covered in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// It reads as zeroes already.
    Nothing,
    /// It becomes zero as a whole, if what lies below reads as zeroes in all of it.
    ZeroIfBelowIs,
    /// Zeroes have to be written as data.
    Write,
}

/// Decides about a subcluster that is covered in part.
pub fn plan_edge(state: ClusterState, subcluster: u32) -> Edge {
    let bit = 1 << subcluster;
    match state.host {
        Host::Compressed(_) => Edge::Write,
        _ if state.zero & bit != 0 => Edge::Nothing,
        _ if state.alloc & bit != 0 => Edge::Write,
        _ => Edge::ZeroIfBelowIs,
    }
}

/// What becomes of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It stays as it is.
    Unchanged,
    /// It changes to this state, and the old host cluster (or compressed extent) loses one reference if `releases`.
    Entry {
        /// The new state.
        state: ClusterState,
        /// The entry stops referring to what it referred to.
        releases: bool,
    },
    /// The entry cannot say it: zeroes have to be written as data.
    Write,
}

fn outcome(old: ClusterState, new: ClusterState) -> Outcome {
    if old == new {
        return Outcome::Unchanged;
    }
    Outcome::Entry { state: new, releases: old.host != Host::None && new.host == Host::None }
}

/// Writes zeroes to the subclusters in `mask` (not 0). `may_unmap`: a host cluster that holds nothing any more is
/// let go. Version 2 has no zero flag: there a cluster can only be let go, which reads as zeroes if nothing lies below.
pub fn plan_zero(geometry: Geometry, state: ClusterState, mask: u32, may_unmap: bool, below_is_zero: bool) -> Outcome {
    let all = geometry.all_subclusters();
    if geometry.version < 3 {
        return match state.host {
            Host::None if below_is_zero => Outcome::Unchanged,
            Host::Compressed(_) if below_is_zero && mask == all => outcome(state, ClusterState::UNALLOCATED),
            Host::Cluster { .. } if below_is_zero && may_unmap => outcome(state, ClusterState::UNALLOCATED),
            _ => Outcome::Write,
        };
    }
    if let Host::Compressed(_) = state.host {
        // A compressed cluster has no subclusters: all or nothing.
        return match mask == all {
            true => outcome(state, ClusterState { host: Host::None, alloc: 0, zero: all }),
            false => Outcome::Write,
        };
    }
    let mut new = ClusterState { host: state.host, alloc: state.alloc & !mask, zero: state.zero | mask };
    if may_unmap && new.alloc == 0 {
        new.host = Host::None;
    }
    outcome(state, new)
}

/// Discards the subclusters in `mask` (not 0). What is dropped reads as zeroes: through zero bits, where something
/// could lie below or was allocated. Where the entry cannot say that, nothing is discarded.
pub fn plan_discard(geometry: Geometry, state: ClusterState, mask: u32, below_is_zero: bool) -> Outcome {
    let all = geometry.all_subclusters();
    if geometry.version < 3 {
        let droppable = below_is_zero && mask == all;
        return if droppable { outcome(state, ClusterState::UNALLOCATED) } else { Outcome::Unchanged };
    }
    if let Host::Compressed(_) = state.host {
        return match mask == all {
            true => outcome(state, ClusterState { host: Host::None, alloc: 0, zero: all }),
            false => Outcome::Unchanged,
        };
    }
    let dropped = if below_is_zero { state.alloc & mask } else { mask };
    let mut new = ClusterState { host: state.host, alloc: state.alloc & !mask, zero: state.zero | dropped };
    if new.alloc == 0 {
        new.host = Host::None;
    }
    outcome(state, new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HostCluster;

    const G: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
    const OURS: Host = Host::Cluster { cluster: HostCluster(5), copied: true };

    fn entry(host: Host, alloc: u32, zero: u32) -> ClusterState {
        ClusterState { host, alloc, zero }
    }

    #[test]
    fn spans_cover_subclusters_whole_or_in_part() {
        let cover = |start, end| cover(G, Span { start, end });
        assert_eq!(cover(0, 65536), Cover { whole: u32::MAX, head: None, tail: None });
        assert_eq!(cover(1024, 5 * 2048), Cover { whole: 0b1_1110, head: Some(0), tail: None });
        assert_eq!(cover(2048, 5 * 2048 + 1), Cover { whole: 0b1_1110, head: None, tail: Some(5) });
        assert_eq!(cover(100, 200), Cover { whole: 0, head: Some(0), tail: None });
        assert_eq!(cover(0, 200), Cover { whole: 0, head: Some(0), tail: None });
        assert_eq!(cover(100, 2048), Cover { whole: 0, head: Some(0), tail: None });
    }

    #[test]
    fn zeroing_keeps_the_host_cluster_unless_all_of_it_may_go() {
        let state = entry(OURS, u32::MAX, 0);
        let half = entry(OURS, 0xffff_0000, 0xffff);
        assert_eq!(plan_zero(G, state, 0xffff, true, true), Outcome::Entry { state: half, releases: false });
        let gone = entry(Host::None, 0, u32::MAX);
        assert_eq!(plan_zero(G, half, 0xffff_0000, true, true), Outcome::Entry { state: gone, releases: true });
        let kept = entry(OURS, 0, u32::MAX);
        assert_eq!(plan_zero(G, half, 0xffff_0000, false, true), Outcome::Entry { state: kept, releases: false });
        assert_eq!(plan_zero(G, kept, 1, false, true), Outcome::Unchanged);
    }

    #[test]
    fn discarding_never_shows_what_lies_below() {
        // Scenario I3: subclusters 16 to 31 are unallocated, the rest is zero.
        let state = entry(Host::None, 0, 0xffff);
        assert_eq!(plan_discard(G, state, u32::MAX, true), Outcome::Unchanged);
        let hidden = entry(Host::None, 0, u32::MAX);
        assert_eq!(plan_discard(G, state, u32::MAX, false), Outcome::Entry { state: hidden, releases: false });
        // A single subcluster, which QEMU does not discard.
        let after = entry(OURS, 0b1011, 0b0100);
        assert_eq!(
            plan_discard(G, entry(OURS, 0b1111, 0), 0b0100, true),
            Outcome::Entry { state: after, releases: false }
        );
    }
}
