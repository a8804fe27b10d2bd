//! Room for compressed clusters, packed by the byte across the boundaries of sectors and of host clusters.
//!
//! One host cluster at a time is being filled ([`RefcountState::packing`]). Each extent counts once in every host cluster
//! that it touches, so that a cluster is free again once nobody is left in it. The place of the next extent only ever
//! moves on: bytes that somebody has had are not handed out again before the whole cluster has been free, even if they
//! were given back unused. The sector in which two extents meet is written again for the second one, but none of the
//! bytes that the first one has. Memory only, as [`find`].

use super::find;
use crate::error::Result;
use crate::format::{HostCluster, HostOffset};
use crate::tables::refcounts::{Need, RefcountState};

/// Takes `length` bytes (fewer than a cluster has) and counts them in the one or two clusters that they lie in.
pub fn take_bytes(state: &mut RefcountState, length: u64) -> Result<std::result::Result<HostOffset, Need>> {
    let geometry = state.geometry();
    let size = geometry.cluster_size_bytes();
    debug_assert!((1..size).contains(&length));
    let mut open = None;
    if let Some(at) = state.packing {
        let cluster = geometry.host_cluster(at);
        let count = match state.get(cluster) {
            Ok(count) => count,
            Err(need) => return Ok(Err(need)),
        };
        // With narrow refcounts a cluster can be full of references before it is full of bytes.
        if (1..geometry.refcount_max()).contains(&count) {
            open = Some((at, cluster, count));
        }
    }
    if let Some((at, cluster, count)) = open {
        let room = size - at.0 % size;
        if length <= room && state.set(cluster, count + 1).is_ok() {
            state.packing = (length < room).then(|| at.plus(length));
            return Ok(Ok(at));
        }
    }
    let next = match find::take(state, 1)? {
        Ok(run) => HostCluster(run.start),
        Err(need) => return Ok(Err(need)),
    };
    let mut start = geometry.host_offset(next);
    if let Some((at, cluster, count)) = open
        && cluster.plus(1) == next
        && state.set(cluster, count + 1).is_ok()
    {
        start = at;
    }
    state.packing = Some(start.plus(length));
    Ok(Ok(start))
}
