//! Counting many clusters at once, as whole trees need it: block by block, and in the memory that the refcount cache
//! has. Changed blocks are written back as they fill it.

use std::ops::Range;

use super::Allocator;
use crate::error::Result;
use crate::format::{HostCluster, HostOffset, l2_table};
use crate::storage::{Io, IoDst};
use crate::tables::Tables;
use crate::tables::refcounts::{Need, RefcountState};
use crate::wait::lock;

type Answer = Result<std::result::Result<(), Need>>;

/// Asks the refcounts for something, and loads what they lack for the answer.
async fn ask<I: Io>(io: &I, tables: &Tables, mut question: impl FnMut(&mut RefcountState) -> Answer) -> Result<()> {
    loop {
        match tables.refcounts.with(&mut question)? {
            Ok(()) => return Ok(()),
            Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
        }
    }
}

/// Parts of a sorted list that one refcount block counts.
fn by_block<'a>(tables: &Tables, clusters: &'a [u64]) -> impl Iterator<Item = &'a [u64]> + use<'a> {
    let bits = tables.geometry.refcount_block_bits();
    clusters.chunk_by(move |a, b| a >> bits == b >> bits)
}

/// The runs that a sorted list consists of. A cluster that is listed several times is in as many of them.
pub fn runs(clusters: &[u64]) -> impl Iterator<Item = Range<u64>> {
    clusters.chunk_by(|a, b| a + 1 == *b).map(|run| run[0]..run[0] + run.len() as u64)
}

async fn make_room<I: Io>(io: &I, tables: &Tables) -> Result<()> {
    if tables.refcounts.wants_write_back() { tables.write_back(io).await } else { Ok(()) }
}

/// See [`RefcountState::check_raise`].
pub async fn check_raise<I: Io>(io: &I, tables: &Tables, clusters: &[u64]) -> Result<()> {
    for part in by_block(tables, clusters) {
        ask(io, tables, |state| state.check_raise(part)).await?;
    }
    Ok(())
}

/// See [`RefcountState::check_lower`].
pub async fn check_lower<I: Io>(io: &I, tables: &Tables, clusters: &[u64]) -> Result<()> {
    for part in by_block(tables, clusters) {
        ask(io, tables, |state| state.check_lower(part)).await?;
    }
    Ok(())
}

/// Adds a reference to each of these clusters, which are sorted. After an error none of them has one more, or will not
/// after the next flush.
pub async fn raise<I: Io>(io: &I, tables: &Tables, clusters: &[u64]) -> Result<()> {
    let mut done = 0;
    for part in by_block(tables, clusters) {
        let mut raised = ask(io, tables, |state| state.raise(part)).await;
        if raised.is_ok() {
            done += part.len();
            raised = make_room(io, tables).await;
        }
        if let Err(e) = raised {
            tables.refcounts.with(|state| state.give_back.extend(runs(&clusters[..done])));
            return Err(e);
        }
    }
    Ok(())
}

/// See [`Allocator::lower`].
pub async fn lower<I: Io>(io: &I, tables: &Tables, allocator: &Allocator, clusters: &[u64], punch: bool) -> Result<()> {
    let mut done = 0;
    for part in by_block(tables, clusters) {
        done += part.len();
        let mut lowered = allocator.lower(io, tables, runs(part).collect(), punch).await;
        if lowered.is_ok() {
            lowered = make_room(io, tables).await;
        }
        if let Err(e) = lowered {
            tables.refcounts.with(|state| state.give_back.extend(runs(&clusters[done..])));
            return Err(e);
        }
    }
    Ok(())
}

/// Notes an L2 table that nothing refers to by a tree that is gone, and that could not be read.
pub fn keep_for_later(allocator: &Allocator, table: HostOffset) {
    lock(&allocator.unread).push(table);
}

/// Takes back the references of tables that could not be read when that was to be done.
pub(super) async fn lower_unread<I: Io>(io: &I, tables: &Tables, allocator: &Allocator, punch: bool) -> Result<()> {
    let geometry = tables.geometry;
    loop {
        let next = lock(&allocator.unread).last().copied();
        let Some(at) = next else { return Ok(()) };
        let mut bytes = vec![0; geometry.cluster_size_bytes() as usize];
        tables.file.read(io, &[IoDst::from(&mut bytes[..])], at).await?;
        lock(&allocator.unread).retain(|table| *table != at);
        // It was verified before the tree was let go; otherwise it is a leak that a repair finds.
        if let Ok(mut clusters) = l2_table::references(&bytes, geometry) {
            clusters.push(geometry.host_cluster(at).0);
            clusters.sort_unstable();
            Box::pin(lower(io, tables, allocator, &clusters, punch)).await?;
        }
    }
}

/// Those of these clusters, which are sorted, that have one reference.
pub async fn with_one_reference<I: Io>(io: &I, tables: &Tables, clusters: &[u64]) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    for part in by_block(tables, clusters) {
        ask(io, tables, |state| {
            let before = found.len();
            for group in part.chunk_by(|a, b| a == b) {
                match state.get(HostCluster(group[0])) {
                    Ok(1) => found.push(group[0]),
                    Ok(_) => {}
                    Err(need) => {
                        found.truncate(before);
                        return Ok(Err(need));
                    }
                }
            }
            Ok(Ok(()))
        })
        .await?;
    }
    Ok(found)
}
