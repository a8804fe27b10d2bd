//! What becomes of guest clusters past an end of the disk: the old one if it grows, the new one if it shrinks.

use super::subcluster_mask;
use crate::format::{ClusterState, Geometry, Host};

/// Subclusters of the cluster that begins at guest offset `cluster_at` which lie before `end`, be it in part.
pub fn kept_subclusters(geometry: Geometry, cluster_at: u64, end: u64) -> u32 {
    match end.saturating_sub(cluster_at).min(geometry.cluster_size_bytes()) {
        0 => 0,
        inside => subcluster_mask(0, geometry.subcluster_of(inside - 1)),
    }
}

/// Drops all subclusters that are not in `kept`. A host cluster stays as long as one is kept, and so does a compressed
/// cluster, which has no subclusters.
pub fn cut(state: ClusterState, kept: u32) -> ClusterState {
    match state.host {
        _ if kept == 0 => ClusterState::UNALLOCATED,
        Host::Compressed(_) => state,
        _ => ClusterState { host: state.host, alloc: state.alloc & kept, zero: state.zero & kept },
    }
}

/// What is allocated ahead where a disk grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// Nothing.
    Nothing,
    /// Host clusters.
    Clusters,
    /// Host clusters that have their space.
    Space,
}

/// What a cluster becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grown {
    /// It gets a host cluster, which reads as zeroes.
    pub wants_host: bool,
    /// Its new allocation bits.
    pub alloc: u32,
    /// Its new zero bits.
    pub zero: u32,
}

/// Plans a cluster that a disk grows over, of which the disk had the subclusters in `kept`, and nothing else ([`cut`]);
/// others that are allocated hold zeroes (a compressed cluster that had to be written anew is allocated whole). Everything
/// new reads as zeroes, also where something lies below that the old end has hidden (scenarios I4, M).
pub fn plan_grown(geometry: Geometry, state: ClusterState, kept: u32, ahead: Ahead, below_is_zero: bool) -> Grown {
    let new = geometry.all_subclusters() & !kept;
    let hidden = if below_is_zero { 0 } else { new };
    // A cluster that the disk had in part stays where it is.
    if kept != 0 || ahead == Ahead::Nothing {
        return Grown { wants_host: false, alloc: state.alloc, zero: state.zero | hidden & !state.alloc };
    }
    if !geometry.extended_l2 {
        return Grown { wants_host: true, alloc: new, zero: 0 };
    }
    match ahead {
        Ahead::Space => Grown { wants_host: true, alloc: hidden, zero: 0 },
        _ => Grown { wants_host: true, alloc: 0, zero: hidden },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HostCluster;

    const EXT: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };
    const STD: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: false, refcount_order: 4 };
    const OURS: Host = Host::Cluster { cluster: HostCluster(5), copied: true };

    #[test]
    fn the_end_may_lie_anywhere() {
        // 503 KiB: in the middle of subcluster 27 of cluster 7 (scenarios M, N).
        assert_eq!(kept_subclusters(EXT, 7 << 16, 503 << 10), u32::MAX >> 4);
        assert_eq!(kept_subclusters(EXT, 6 << 16, 503 << 10), u32::MAX);
        assert_eq!(kept_subclusters(EXT, 8 << 16, 503 << 10), 0);
        assert_eq!(kept_subclusters(EXT, 0, 2048), 1);
        assert_eq!(kept_subclusters(EXT, 0, 2049), 3);
        assert_eq!(kept_subclusters(STD, 0, 1), 1);
        assert_eq!(kept_subclusters(STD, 1 << 16, 1 << 16), 0);
    }

    #[test]
    fn what_is_cut_off_is_forgotten() {
        let state = ClusterState { host: OURS, alloc: 0xff00, zero: 0xff };
        assert_eq!(cut(state, 0), ClusterState::UNALLOCATED);
        assert_eq!(cut(state, 0xf0f), ClusterState { host: OURS, alloc: 0xf00, zero: 0xf });
    }

    #[test]
    fn new_clusters_hide_what_lies_below() {
        let none = ClusterState::UNALLOCATED;
        let grown = |geometry, kept, ahead, below_is_zero| {
            let grown = plan_grown(geometry, none, kept, ahead, below_is_zero);
            (grown.wants_host, grown.alloc, grown.zero)
        };
        assert_eq!(grown(EXT, 0, Ahead::Nothing, true), (false, 0, 0));
        assert_eq!(grown(EXT, 0, Ahead::Nothing, false), (false, 0, u32::MAX));
        assert_eq!(grown(EXT, 1, Ahead::Nothing, false), (false, 0, u32::MAX - 1));
        assert_eq!(grown(EXT, 0, Ahead::Clusters, false), (true, 0, u32::MAX));
        assert_eq!(grown(EXT, 0, Ahead::Clusters, true), (true, 0, 0));
        assert_eq!(grown(EXT, 0, Ahead::Space, false), (true, u32::MAX, 0));
        assert_eq!(grown(STD, 0, Ahead::Nothing, false), (false, 0, 1));
        assert_eq!(grown(STD, 0, Ahead::Clusters, false), (true, 1, 0));
        assert_eq!(grown(STD, 1, Ahead::Clusters, false), (false, 0, 0));
        let inflated = ClusterState { host: OURS, alloc: u32::MAX, zero: 0 };
        let grown = plan_grown(EXT, inflated, 0xff, Ahead::Nothing, false);
        assert_eq!((grown.alloc, grown.zero), (u32::MAX, 0));
    }
}
