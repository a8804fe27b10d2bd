//! Taking references back: what was released is lowered, punched and free again, run by run.

use std::ops::Range;

use super::{Allocator, bulk, find};
use crate::error::Result;
use crate::format::HostOffset;
use crate::storage::Io;
use crate::tables::Tables;
use crate::tables::refcounts::{Need, RefcountState, Refcounts};
use crate::wait::lock;

/// Host clusters, each of which loses the same number of references.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    clusters: Range<u64>,
    times: u64,
}

/// Runs that may overlap, as parts that do not, in order.
fn parts(mut runs: Vec<Range<u64>>) -> Vec<Part> {
    runs.retain(|run| !run.is_empty());
    runs.sort_unstable_by_key(|run| run.start);
    if runs.windows(2).all(|pair| pair[0].end <= pair[1].start) {
        return runs.into_iter().map(|clusters| Part { clusters, times: 1 }).collect();
    }
    let mut ends: Vec<u64> = runs.iter().map(|run| run.end).collect();
    ends.sort_unstable();
    let mut parts = Vec::new();
    let (mut at, mut times) = (0, 0);
    let mut starts = runs.iter().map(|run| run.start).peekable();
    for end in ends {
        while let Some(start) = starts.next_if(|&start| start <= end) {
            if times > 0 && at < start {
                parts.push(Part { clusters: at..start, times });
            }
            (at, times) = (start, times + 1);
        }
        if at < end {
            parts.push(Part { clusters: at..end, times });
        }
        (at, times) = (end, times - 1);
    }
    parts
}

/// The part of a range that its first refcount block counts.
fn in_first_block(tables: &Tables, clusters: &Range<u64>) -> Range<u64> {
    let bits = tables.geometry.refcount_block_bits();
    clusters.start..clusters.end.min(((clusters.start >> bits) + 1) << bits)
}

impl Allocator {
    /// Takes back all released clusters for which that is safe now. With `punch`, the file first gives up the space of
    /// those that become free: after that they may be handed out again at any moment (scenario D11). `false`: more is to
    /// be done once changed refcount blocks have been written.
    pub async fn settle<I: Io>(&self, io: &I, tables: &Tables, punch: bool) -> Result<bool> {
        self.transfers.advance();
        let durable = tables.order.durable_through();
        let mut ready = tables.refcounts.with(|state| std::mem::take(&mut state.give_back));
        lock(&self.released).retain(|r| {
            let safe = r.change <= durable && self.transfers.has_passed(r.epoch);
            if safe {
                ready.push(r.clusters.clone());
            }
            !safe
        });
        self.lower(io, tables, ready, punch).await?;
        bulk::lower_unread(io, tables, self, punch).await?;
        Ok(tables.refcounts.with(|state| state.give_back.is_empty()))
    }

    /// Takes back a reference to each cluster of these runs, at once: a cluster that is in several of them loses as
    /// many. The caller knows that it is safe: that nothing on disk or in memory refers to them by it any more. What an
    /// error, or a cache full of changed blocks, gets in the way of is left to the next call of [`Allocator::settle`].
    pub async fn lower<I: Io>(&self, io: &I, tables: &Tables, runs: Vec<Range<u64>>, punch: bool) -> Result<()> {
        let mut lowering = Lowering { refcounts: &tables.refcounts, left: parts(runs) };
        lowering.left.reverse(); // taken from the end, in order
        if punch {
            punch_freed(io, tables, lowering.left.iter().rev()).await?;
        }
        while let Some(part) = lowering.left.last_mut() {
            let now = in_first_block(tables, &part.clusters);
            let block = now.start >> tables.geometry.refcount_block_bits();
            let (done, outcome) = tables.refcounts.with(|state| state.lower_run(now.clone(), part.times));
            part.clusters.start += done;
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(need)) => tables.refcounts.load(io, &tables.file, need).await?,
                Err(corrupt) => {
                    part.clusters.start += 1; // it cannot be lowered, now or later
                    return Err(corrupt);
                }
            }
            if part.clusters.is_empty() {
                lowering.left.pop();
            }
            let is_in_block = |part: &Part| part.clusters.start >> tables.geometry.refcount_block_bits() == block;
            if !lowering.left.last().is_none_or(is_in_block) && tables.refcounts.wants_write_back() {
                return Ok(()); // so that changed blocks never take more memory than they may (M9)
            }
        }
        Ok(())
    }
}

/// Punches the clusters whose counts are about to become 0, neighbours at once.
async fn punch_freed<I: Io>(io: &I, tables: &Tables, parts: impl Iterator<Item = &Part>) -> Result<()> {
    let mut run = 0..0;
    for part in parts {
        let mut left = part.clusters.clone();
        while !left.is_empty() {
            let now = in_first_block(tables, &left);
            let freed = loop {
                match tables.refcounts.with(|state| freed_of(state, now.clone(), part.times)) {
                    Ok(freed) => break freed,
                    Err(need) => tables.refcounts.load(io, &tables.file, need).await?,
                }
            };
            for freed in freed {
                // An entry that pointed there was wrong; what it pointed to is needed.
                tables.refcounts.with(|state| find::check_free(state, freed.clone()))?;
                tables.check_unused(freed.clone())?;
                if run.end != freed.start {
                    punch(io, tables, &run).await;
                    run = freed.start..freed.start;
                }
                run.end = freed.end;
            }
            left.start = now.end;
        }
    }
    punch(io, tables, &run).await;
    Ok(())
}

/// The runs of clusters, of those in one block, that have no reference more than `times`. No compressed extent comes into
/// them from now on: nothing may do so between the look at the count and the punch.
fn freed_of(state: &mut RefcountState, clusters: Range<u64>, times: u64) -> std::result::Result<Vec<Range<u64>>, Need> {
    let freed = state.with_references(&clusters, times)?;
    freed.iter().for_each(|run| state.end_packing(run));
    Ok(freed)
}

async fn punch<I: Io>(io: &I, tables: &Tables, run: &Range<u64>) {
    let size = tables.geometry.cluster_size_bytes();
    if !run.is_empty() {
        tables.file.punch_hole(io, HostOffset(run.start * size), (run.end - run.start) * size).await;
    }
}

/// Clusters whose counts are being lowered; what is left when that ends early is kept for the next time.
struct Lowering<'a> {
    refcounts: &'a Refcounts,
    left: Vec<Part>,
}

impl Drop for Lowering<'_> {
    fn drop(&mut self) {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            self.refcounts.with(|state| {
                for part in left {
                    (0..part.times).for_each(|_| state.give_back.push(part.clusters.clone()));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_take_from_each_cluster_what_the_runs_do() {
        let mut seed = 1u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (seed >> 33) % below
        };
        for round in 0..20_000 {
            let runs: Vec<Range<u64>> = (0..random(7))
                .map(|_| {
                    let start = random(12);
                    start..start + random(5)
                })
                .collect();
            let mut counts = [0u64; 20];
            runs.iter().cloned().flatten().for_each(|cluster| counts[cluster as usize] += 1);
            let parts = parts(runs.clone());
            assert!(parts.windows(2).all(|pair| pair[0].clusters.end <= pair[1].clusters.start), "{round}: {runs:?}");
            for part in &parts {
                assert!(!part.clusters.is_empty() && part.times > 0, "{round}: {runs:?} became {parts:?}");
                part.clusters.clone().for_each(|cluster| counts[cluster as usize] -= part.times);
            }
            assert_eq!(counts, [0; 20], "{round}: {runs:?} became {parts:?}");
        }
    }
}
