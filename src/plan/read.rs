//! What a range of a cluster reads from, and which neighbouring runs are one transfer.

use super::Span;
use crate::format::l2::CompressedExtent;
use crate::format::{ClusterState, Geometry, Host, HostOffset};

/// Where the bytes of a run come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From the image file, contiguously from this offset on.
    Data(HostOffset),
    /// They are zeroes. A host cluster may be preallocated for them.
    Zero(Option<HostOffset>),
    /// From the backing file, or zeroes without one. A host cluster may exist for other subclusters.
    Unallocated(Option<HostOffset>),
    /// From a compressed cluster.
    Compressed(CompressedExtent),
}

/// A run of bytes with one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where they come from.
    pub source: Source,
    /// How many.
    pub length_bytes: u64,
}

/// The run that starts at `span.start` of a cluster in state `state`, at most up to `span.end`.
pub fn run_at(geometry: Geometry, state: ClusterState, span: Span) -> Run {
    debug_assert!(!span.is_empty() && span.end <= geometry.cluster_size_bytes());
    if let Host::Compressed(extent) = state.host {
        return Run { source: Source::Compressed(extent), length_bytes: span.len() };
    }
    let first = geometry.subcluster_of(span.start);
    let bit = 1 << first;
    // Subclusters from `first` on that are of the same kind as `first`: count the ones of its mask.
    let same = if state.alloc & bit != 0 {
        state.alloc
    } else if state.zero & bit != 0 {
        state.zero
    } else {
        !(state.alloc | state.zero)
    };
    let count = (same >> first).trailing_ones().min(geometry.subclusters() - first);
    let end = u64::from(first + count) << geometry.subcluster_bits();
    let host = match state.host {
        Host::Cluster { cluster, .. } => Some(geometry.host_offset(cluster).plus(span.start)),
        _ => None,
    };
    let source = match host {
        Some(offset) if state.alloc & bit != 0 => Source::Data(offset),
        _ if state.zero & bit != 0 => Source::Zero(host),
        _ => Source::Unallocated(host),
    };
    Run { source, length_bytes: end.min(span.end) - span.start }
}

/// Whether `next`, which follows `run` in the guest, continues it without a seam.
pub fn continues(run: &Run, next: &Run) -> bool {
    let follows = |a: HostOffset, b: HostOffset| a.plus(run.length_bytes) == b;
    match (run.source, next.source) {
        (Source::Data(a), Source::Data(b)) => follows(a, b),
        (Source::Zero(None), Source::Zero(None)) => true,
        (Source::Zero(Some(a)), Source::Zero(Some(b))) => follows(a, b),
        (Source::Unallocated(None), Source::Unallocated(None)) => true,
        (Source::Unallocated(Some(a)), Source::Unallocated(Some(b))) => follows(a, b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::HostCluster;

    const G: Geometry = Geometry { version: 3, cluster_bits: 16, extended_l2: true, refcount_order: 4 };

    #[test]
    fn runs_end_where_the_kind_changes() {
        let host = Host::Cluster { cluster: HostCluster(5), copied: true };
        let state = ClusterState { host, alloc: 0b0011, zero: 0b0100 };
        let run = |start, end| run_at(G, state, Span { start, end });
        let base = HostOffset(5 << 16);
        assert_eq!(run(1024, 65536), Run { source: Source::Data(base.plus(1024)), length_bytes: 3072 });
        assert_eq!(run(4096, 65536), Run { source: Source::Zero(Some(base.plus(4096))), length_bytes: 2048 });
        assert_eq!(run(6144, 65536), Run { source: Source::Unallocated(Some(base.plus(6144))), length_bytes: 59392 });
        assert_eq!(run(0, 100).length_bytes, 100);
    }

    #[test]
    fn a_standard_cluster_is_one_run() {
        let g = Geometry { extended_l2: false, ..G };
        let run = run_at(g, ClusterState::UNALLOCATED, Span { start: 5, end: 65536 });
        assert_eq!(run, Run { source: Source::Unallocated(None), length_bytes: 65531 });
    }
}
