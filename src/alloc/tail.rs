//! The end of the file: how far it is in use, and refcount blocks there that count nothing but themselves. For who has
//! the image to himself, with nothing waiting to be written.

use crate::error::{CorruptionKind, Result};
use crate::format::{HostCluster, refcount};
use crate::storage::Io;
use crate::tables::Tables;
use crate::tables::refcounts::{Need, RefcountState};

/// What the search for the end has found so far.
enum Step {
    /// Everything from this cluster on is free.
    End(u64),
    /// Nothing is used in this block and behind it.
    Below(u64),
}

/// One past the last cluster that is in use, as the counts say. Blocks behind it are dropped from the table, which has
/// to be flushed before the space is given up. Fails rather than give an end before any known table.
pub async fn used_end<I: Io>(io: &I, tables: &Tables) -> Result<u64> {
    let mut index = loop {
        match tables.refcounts.with(|state| state.blocks_end()) {
            Ok(end) => break end,
            Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
        }
    };
    loop {
        match tables.refcounts.with(|state| look(state, index)) {
            Ok(Step::End(end)) => {
                tables.refcounts.with(|state| check(state, end))?;
                return Ok(end);
            }
            Ok(Step::Below(next)) => index = next,
            Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
        }
    }
}

/// Looks at the block before block `end`.
fn look(state: &mut RefcountState, end: u64) -> std::result::Result<Step, Need> {
    let Some(index) = end.checked_sub(1) else { return Ok(Step::End(0)) };
    if !state.has_block(index)? {
        return Ok(Step::Below(index));
    }
    let geometry = state.geometry();
    let order = geometry.refcount_order;
    let entries = geometry.refcount_block_entries() as usize;
    let first = state.block_start(index);
    let own = state.block_place(index);
    let block = state.block(index)?;
    let last = (0..entries).rev().find(|&entry| refcount::get(block, order, entry) != 0);
    let Some(last) = last else { return Ok(Step::Below(index)) };
    let is_own = first.plus(last as u64) == own && refcount::get(block, order, last) == 1;
    let is_alone = is_own && (0..last).all(|entry| refcount::get(block, order, entry) == 0);
    // The first block counts the header.
    if is_alone && index > 0 {
        state.drop_block(index);
        return Ok(Step::Below(index));
    }
    Ok(Step::End(first.0 + last as u64 + 1))
}

/// Refuses an end before something that is known to be in use, whatever its count says.
fn check(state: &RefcountState, end: u64) -> Result<()> {
    match state.table_behind(HostCluster(end)) {
        Some(cluster) => Err(state.corrupt(CorruptionKind::MetadataCountedFree, cluster)),
        None => Ok(()),
    }
}
