//! Finding free host clusters, and growing the refcount structures when there are none. Memory only: what is
//! missing is named ([`Need`]), loaded by the caller, and the search is repeated.

use std::ops::Range;

use crate::error::{CorruptionKind, Error, Result};
use crate::format::{HostCluster, refcount};
use crate::tables::refcounts::{Need, RefcountState, TABLE_BYTES_MAX};

/// Host offsets in tables have 56 bits.
const HOST_BITS: u32 = 56;

/// Takes a run of `want` free clusters (fewer only where the run ends with its refcount block), counts each once, and
/// returns it. First fit, so that files stay as short as they can.
pub fn take(state: &mut RefcountState, want: u64) -> Result<std::result::Result<Range<u64>, Need>> {
    Ok(take_for(state, want, None)?.map(|(run, _)| run))
}

/// As [`take`], for the data of guest cluster `at` and those that follow. Says whether the run was counted ahead.
pub fn take_for(
    state: &mut RefcountState,
    want: u64,
    at: Option<u64>,
) -> Result<std::result::Result<(Range<u64>, bool), Need>> {
    let start = if want == 1 { state.hint } else { state.hint.max(state.run_hint) };
    let ahead = state.ahead_start();
    let found = match ahead.is_some_and(|ahead| start.0 >= ahead) {
        true => None,
        false => match search(state, start, want, ahead)? {
            Ok(found) => found,
            Err(need) => return Ok(Err(need)),
        },
    };
    let is_ahead = found.is_none();
    let run = match found {
        Some(run) => match count(state, run)? {
            Ok(run) => run,
            Err(need) => return Ok(Err(need)),
        },
        // Nothing is free before it.
        None => match state.take_ahead(want, at) {
            Some(run) => run,
            None => unreachable!("a search without an end finds something"),
        },
    };
    state.note_handed_out(&run);
    let end = HostCluster(run.end);
    // How far nothing is left to be found.
    let searched = if is_ahead { end.max(start).max(HostCluster(ahead.unwrap_or(0))) } else { end };
    if want == 1 {
        state.hint = searched;
    } else {
        state.run_hint = searched;
        if state.hint.0 == run.start {
            state.hint = end;
        }
    }
    Ok(Ok((run, is_ahead)))
}

/// As [`take`], from cluster `from` on.
pub fn take_from(
    state: &mut RefcountState,
    from: HostCluster,
    want: u64,
) -> Result<std::result::Result<Range<u64>, Need>> {
    match search(state, from, want, None)? {
        Ok(Some(run)) => {
            state.note_handed_out(&run);
            count(state, run)
        }
        Ok(None) => unreachable!("a search without an end finds something"),
        Err(need) => Ok(Err(need)),
    }
}

/// Counts a run that was found free.
fn count(state: &mut RefcountState, run: Range<u64>) -> Result<std::result::Result<Range<u64>, Need>> {
    check_free(state, run.clone())?;
    for cluster in run.clone() {
        if let Err(need) = state.set(HostCluster(cluster), 1) {
            return Ok(Err(need));
        }
    }
    Ok(Ok(run))
}

/// Takes `want` free clusters in one piece, which may be more than a refcount block counts: behind all that is counted,
/// after the new blocks that count them.
pub fn take_behind(state: &mut RefcountState, want: u64) -> Result<std::result::Result<Range<u64>, Need>> {
    let geometry = state.geometry();
    loop {
        let index = match state.blocks_end() {
            Ok(index) => index,
            Err(need) => return Ok(Err(need)),
        };
        // As many blocks as count the clusters and themselves.
        let blocks = want.div_ceil(geometry.refcount_block_entries() - 1);
        let start = state.block_start(index);
        if start.0 + blocks + want > 1 << (HOST_BITS - geometry.cluster_bits) {
            return Err(Error::TooLarge { what: "the image file", limit: 1 << HOST_BITS });
        }
        if index + blocks > state.table_capacity() {
            grow_table(state, index + blocks - 1)?;
            continue;
        }
        let area = start.0..start.0 + blocks + want;
        check_free(state, area.clone())?;
        (0..blocks).for_each(|block| state.add_block(index + block, start.plus(block)));
        count_new(state, area.clone());
        return Ok(Ok(start.0 + blocks..area.end));
    }
}

/// Finds a run from cluster `from` on; `None` where there is none before cluster `until`.
fn search(
    state: &mut RefcountState,
    from: HostCluster,
    want: u64,
    until: Option<u64>,
) -> Result<std::result::Result<Option<Range<u64>>, Need>> {
    let geometry = state.geometry();
    let (bits, order) = (geometry.refcount_block_bits(), geometry.refcount_order);
    let mut at = from.0;
    loop {
        let index = at >> bits;
        // Asked of blocks that exist as well: a file may claim to count clusters that no entry can point to.
        if index >> (HOST_BITS - geometry.cluster_bits - bits) != 0 {
            return Err(Error::TooLarge { what: "the image file", limit: 1 << HOST_BITS });
        }
        match state.has_block(index) {
            Err(need) => return Ok(Err(need)),
            Ok(false) => add_block(state, index)?,
            Ok(true) => {}
        }
        let block = match state.block(index) {
            Ok(block) => block,
            Err(need) => return Ok(Err(need)),
        };
        let entries = 1usize << bits;
        let mut entry = (at & (entries as u64 - 1)) as usize;
        while entry < entries {
            let Some(first) = (entry..entries).find(|&e| refcount::get(block, order, e) == 0) else { break };
            let limit = entries.min(first + want.min(entries as u64) as usize);
            let end = (first..limit).find(|&e| refcount::get(block, order, e) != 0).unwrap_or(limit);
            if end == entries || (end - first) as u64 == want {
                let base = index << bits;
                let run = base + first as u64..base + end as u64;
                return Ok(Ok(until.is_none_or(|until| run.start < until).then_some(run)));
            }
            entry = end + 1;
        }
        at = (index + 1) << bits;
        if until.is_some_and(|until| at >= until) {
            return Ok(Ok(None));
        }
        // Remembered, because a search that has to wait for a block starts again: with a cache that holds fewer
        // blocks than are full, it would evict the first ones to load the next and never arrive.
        let passed = if want == 1 { &mut state.hint } else { &mut state.run_hint };
        *passed = HostCluster(at).max(*passed);
    }
}

/// Adds refcount block `index`, which counts clusters that nothing has counted so far: all of them are free.
fn add_block(state: &mut RefcountState, index: u64) -> Result<()> {
    let start = state.block_start(index);
    if index >= state.table_capacity() {
        return grow_table(state, index);
    }
    check_free(state, start.0..start.0 + 1)?;
    state.add_block(index, start);
    count_new(state, start.0..start.0 + 1);
    Ok(())
}

/// Moves the refcount table to a place where it has room for block `index` and half as many again. The new table and
/// the blocks that count it lie together, from the first cluster of `index` on.
fn grow_table(state: &mut RefcountState, index: u64) -> Result<()> {
    let geometry = state.geometry();
    let size = |blocks: u64| ((index + blocks) * 8).div_ceil(geometry.cluster_size_bytes());
    let max = TABLE_BYTES_MAX / geometry.cluster_size_bytes();
    let (mut blocks, mut clusters);
    let mut next_blocks = 1;
    loop {
        blocks = next_blocks;
        let least = size(blocks);
        if least > max {
            return Err(Error::TooLarge { what: "the refcount table", limit: TABLE_BYTES_MAX });
        }
        clusters = (least + least / 2).min(max);
        next_blocks = (blocks + clusters).div_ceil(geometry.refcount_block_entries());
        if next_blocks <= blocks {
            break;
        }
    }
    let start = state.block_start(index);
    let area = start.0..start.0 + blocks + clusters;
    check_free(state, area.clone())?;
    state.move_table(start.plus(blocks), clusters);
    for block in 0..blocks {
        state.add_block(index + block, start.plus(block));
    }
    count_new(state, area);
    Ok(())
}

/// Refuses clusters that hold metadata, whatever their counts say.
pub fn check_free(state: &RefcountState, run: Range<u64>) -> Result<()> {
    if state.overlaps_metadata(&run) {
        let culprit = run.clone().find(|&cluster| state.overlaps_metadata(&(cluster..cluster + 1)));
        let culprit = HostCluster(culprit.unwrap_or(run.start));
        return Err(state.corrupt(CorruptionKind::MetadataCountedFree, culprit));
    }
    Ok(())
}

fn count_new(state: &mut RefcountState, run: Range<u64>) {
    state.note_handed_out(&run);
    for cluster in run {
        let counted = state.set(HostCluster(cluster), 1);
        debug_assert!(counted.is_ok(), "the blocks were added just now");
    }
}
