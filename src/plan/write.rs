//! The heart: what a write into one cluster must copy, and what its allocation and zero bits become.
//!
//! Think of a write from the middle of subcluster #3 to the end of its cluster (scenarios, section 0):
//!
//! 1. **No host cluster of our own yet** ([`Target::New`]). The new cluster must hold what the touched subclusters held
//!    outside of the written bytes. If the old cluster exists but is shared, it must also hold every subcluster that
//!    was allocated there, because the entry will point away from the old cluster; the copy then runs from the first
//!    to the last subcluster that is allocated or written, so that copy and payload are ONE write. Unallocated and
//!    zero subclusters before and after that span are not copied: their bits are carried over instead.
//!    A compressed cluster has no subclusters: all of it is copied.
//! 2. **The host cluster is ours** (COPIED; [`Target::InPlace`]).
//!    1. The edge subcluster is unallocated or zero: it is filled up to its edge, nothing else is.
//!    2. It is allocated: nothing is copied. The bits change only if another touched subcluster was not allocated;
//!       if all of them were, no metadata is touched at all ([`WritePlan::next`] is `None`).
//!
//! Whatever is copied, the bytes that go to the host cluster are one contiguous range ([`WritePlan::io`]).

use super::{Span, subcluster_mask};
use crate::format::l2::CompressedExtent;
use crate::format::{ClusterState, Geometry, Host, HostCluster};

/// Where the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Into the host cluster that the entry has already, which is ours alone.
    InPlace(HostCluster),
    /// Into a host cluster that has to be allocated.
    New,
}

/// The allocation and zero bits of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bits {
    /// Subclusters whose data is in the host cluster.
    pub alloc: u32,
    /// Subclusters that read as zeroes.
    pub zero: u32,
}

/// What a write into one cluster does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WritePlan {
    /// Where the bytes go.
    pub target: Target,
    /// Range of the host cluster that is written: copied head, payload, copied tail.
    pub io: Span,
    /// The payload's place in it.
    pub payload: Span,
    /// The entry's new bits; `None` if the entry stays as it is.
    pub next: Option<Bits>,
    /// The entry stops referring to its old host cluster (or compressed extent), which loses one reference.
    pub releases_old: bool,
}

impl WritePlan {
    /// Bytes before the payload that have to be filled with what the guest saw there.
    pub fn head(&self) -> Span {
        Span { start: self.io.start, end: self.payload.start }
    }

    /// Bytes after the payload that have to be filled with what the guest saw there.
    pub fn tail(&self) -> Span {
        Span { start: self.payload.end, end: self.io.end }
    }

    /// Subclusters that show data of the host cluster from now on and did not before.
    pub fn newly_shown(&self, old: ClusterState) -> u32 {
        let had = if self.target == Target::New { 0 } else { old.alloc };
        self.next.map_or(0, |bits| bits.alloc & !had)
    }

    /// Whether the guest saw zeroes, and nothing else, in all subclusters that are newly shown. `below_is_zero`: nothing
    /// lies under the cluster.
    pub fn covers_zeroes(&self, old: ClusterState, below_is_zero: bool) -> bool {
        let shown = self.newly_shown(old);
        let zeroes = if below_is_zero { !old.alloc } else { old.zero };
        !matches!(old.host, Host::Compressed(_)) && shown & !zeroes == 0
    }

    /// The same write where the host cluster holds zeroes wherever its entry shows nothing, and the guest saw zeroes
    /// there: nothing has to be filled.
    pub fn onto_zeroes(self) -> Self {
        Self { io: self.payload, ..self }
    }

    /// The write is in place and no metadata changes.
    pub fn is_pure_overwrite(&self) -> bool {
        self.next.is_none()
    }
}

/// Plans a write of `payload` (not empty) into a cluster in state `state`.
pub fn plan_write(geometry: Geometry, state: ClusterState, payload: Span) -> WritePlan {
    debug_assert!(!payload.is_empty() && payload.end <= geometry.cluster_size_bytes());
    let first = geometry.subcluster_of(payload.start);
    let last = geometry.subcluster_of(payload.end - 1);
    match state.host {
        Host::Cluster { cluster, copied: true } => in_place(geometry, state, cluster, payload, first, last),
        Host::Cluster { copied: false, .. } => {
            let first = first.min(state.alloc.trailing_zeros());
            let last = last.max(31u32.saturating_sub(state.alloc.leading_zeros()));
            new_cluster(geometry, state, payload, first, last)
        }
        Host::Compressed(_) => new_cluster(geometry, state, payload, 0, geometry.subclusters() - 1),
        Host::None => new_cluster(geometry, state, payload, first, last),
    }
}

/// The new state of a cluster all of which is written, as a compressed extent that was made for it, and whether the old
/// host cluster (or compressed extent) loses a reference. The extent is never the old one, and never ours: what is
/// compressed is not written in place.
pub fn plan_compressed(old: ClusterState, extent: CompressedExtent) -> (ClusterState, bool) {
    (ClusterState { host: Host::Compressed(extent), alloc: 0, zero: 0 }, old.host != Host::None)
}

/// Situation 1: the new cluster holds all of subclusters `first..=last`.
fn new_cluster(geometry: Geometry, state: ClusterState, payload: Span, first: u32, last: u32) -> WritePlan {
    let filled = subcluster_mask(first, last);
    WritePlan {
        target: Target::New,
        io: Span { start: subcluster_start(geometry, first), end: subcluster_start(geometry, last + 1) },
        payload,
        next: Some(Bits { alloc: filled, zero: state.zero & !filled }),
        releases_old: state.host != Host::None,
    }
}

/// Situation 2: fill up an edge subcluster only if it holds nothing yet.
fn in_place(
    geometry: Geometry,
    state: ClusterState,
    cluster: HostCluster,
    payload: Span,
    first: u32,
    last: u32,
) -> WritePlan {
    let is_allocated = |subcluster: u32| state.alloc & 1 << subcluster != 0;
    let mut io = payload;
    if !is_allocated(first) {
        io.start = subcluster_start(geometry, first);
    }
    if !is_allocated(last) {
        io.end = subcluster_start(geometry, last + 1);
    }
    let touched = subcluster_mask(first, last);
    let next = Bits { alloc: state.alloc | touched, zero: state.zero & !touched };
    WritePlan {
        target: Target::InPlace(cluster),
        io,
        payload,
        next: (next.alloc != state.alloc).then_some(next),
        releases_old: false,
    }
}

fn subcluster_start(geometry: Geometry, subcluster: u32) -> u64 {
    u64::from(subcluster) << geometry.subcluster_bits()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HostOffset;

    /// The geometry of the scenarios: 64 KiB clusters, 2 KiB subclusters.
    const G: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
    const OURS: Host = Host::Cluster { cluster: HostCluster(5), copied: true };
    const SHARED: Host = Host::Cluster { cluster: HostCluster(5), copied: false };
    /// From the middle of subcluster #3 to the end of the cluster.
    const MIDDLE_OF_3: Span = Span { start: 7 * 1024, end: 64 * 1024 };

    fn plan(host: Host, alloc: u32, zero: u32) -> WritePlan {
        plan_write(G, ClusterState { host, alloc, zero }, MIDDLE_OF_3)
    }

    #[test]
    fn situation_1_new_cluster_copies_the_head_of_subcluster_3_and_carries_the_leading_bits_over() {
        let plan = plan(Host::None, 0, 0b011);
        assert_eq!((plan.target, plan.io), (Target::New, Span { start: 6 * 1024, end: 64 * 1024 }));
        assert_eq!(plan.next, Some(Bits { alloc: 0xffff_fff8, zero: 0b011 }));
        assert!(!plan.releases_old);
    }

    #[test]
    fn situation_1_shared_cluster_copies_from_its_first_allocated_subcluster() {
        let plan = plan(SHARED, 0b010, 0b001);
        assert_eq!((plan.target, plan.io.start), (Target::New, 2 * 1024));
        assert_eq!(plan.next, Some(Bits { alloc: 0xffff_fffe, zero: 0b001 }));
        assert!(plan.releases_old);
    }

    #[test]
    fn situation_1_shared_cluster_without_allocated_subclusters() {
        let plan = plan(SHARED, 0, u32::MAX);
        assert_eq!(plan.io.start, 6 * 1024);
        assert_eq!(plan.next, Some(Bits { alloc: 0xffff_fff8, zero: 0b111 }));
        let start = Span { start: 0, end: 1024 };
        let plan = plan_write(G, ClusterState { host: SHARED, alloc: 0, zero: u32::MAX }, start);
        assert_eq!(plan.io, Span { start: 0, end: 2048 });
    }

    #[test]
    fn situation_1_compressed_cluster_is_copied_whole() {
        let extent = CompressedExtent { offset: HostOffset(0x50000), length_bytes: 512 };
        let plan = plan(Host::Compressed(extent), 0, 0);
        assert_eq!(plan.io, Span { start: 0, end: 64 * 1024 });
        assert_eq!(plan.next, Some(Bits { alloc: u32::MAX, zero: 0 }));
    }

    #[test]
    fn situation_2_1_fills_the_head_of_subcluster_3_only() {
        for zero in [0, 0b1000] {
            let plan = plan(OURS, 0b0111, zero);
            assert_eq!(plan.io, Span { start: 6 * 1024, end: 64 * 1024 });
            assert_eq!(plan.next, Some(Bits { alloc: u32::MAX, zero: 0 }));
        }
    }

    #[test]
    fn situation_2_2_copies_nothing_and_changes_the_bitmap_only_where_needed() {
        let some = plan(OURS, 0b1111, 0);
        assert_eq!(some.io, MIDDLE_OF_3);
        assert_eq!(some.next, Some(Bits { alloc: u32::MAX, zero: 0 }));
        let all = plan(OURS, 0xffff_fff8, 0b111);
        assert_eq!(all.io, MIDDLE_OF_3);
        assert!(all.is_pure_overwrite());
    }
}
