//! Who gets which clusters of a run that is counted ahead: sequential writers, in whatever thread or queue, do not get
//! them in turns, but each a region of its own.
//!
//! A write that goes on, in the guest's order, where another left off belongs to its stream. So a stream is known by its
//! second write, and takes from its region from then on; a single one gets one region behind the other, as if there were
//! none. All others share what is left. Regions are parts of the run: nobody but the run's owner counts, prepares or gives
//! back clusters.

use std::ops::Range;

/// Streams that are remembered; the one that was not heard of for the longest time is forgotten for a new one.
const STREAMS_MAX: usize = 8;
/// Clusters of a stream's first region; each is twice the last, up to a limit.
const FIRST_CLUSTERS: u64 = 4;
/// How many guest clusters a write may be ahead or behind: requests that were sent together come in any order.
const SLACK: u64 = 8;

#[derive(Debug, Default, Clone)]
struct Stream {
    next: u64, // the guest cluster that it goes on with
    left: Range<u64>,
    next_clusters: u64, // of its next region; 0: one write does not make a stream
    used: u64,
}

/// The streams, and what they have kept for themselves.
#[derive(Debug, Default)]
pub struct Streams {
    streams: Vec<Stream>,
    clock: u64,
}

impl Streams {
    /// What is kept: ranges that are not empty.
    pub fn kept(&self) -> impl Iterator<Item = Range<u64>> {
        self.streams.iter().map(|stream| stream.left.clone()).filter(|left| !left.is_empty())
    }

    /// Takes up to `want` clusters for guest cluster `at`, from a region that may take up to `most` clusters from `left`,
    /// or from `left` itself. Where that is empty, whatever is kept is everybody's. `None`: there is nothing.
    pub fn take(&mut self, left: &mut Range<u64>, want: u64, at: Option<u64>, most: u64) -> Option<Range<u64>> {
        self.clock += 1;
        let found = at.map(|at| self.find(at));
        if let Some((index, goes_on)) = found {
            let stream = &mut self.streams[index];
            stream.used = self.clock;
            if goes_on && stream.left.is_empty() {
                stream.next_clusters = (stream.next_clusters * 2).clamp(FIRST_CLUSTERS, most.max(FIRST_CLUSTERS));
                stream.left = cut(left, stream.next_clusters.max(want)).unwrap_or_default();
            }
        }
        let kept = |stream: &&mut Stream| !stream.left.is_empty();
        let taken = match found {
            Some((index, true)) => cut(&mut self.streams[index].left, want),
            _ => None,
        };
        let taken = taken.or_else(|| cut(left, want)).or_else(|| {
            let oldest = self.streams.iter_mut().filter(kept).min_by_key(|stream| stream.used);
            oldest.and_then(|stream| cut(&mut stream.left, want))
        })?;
        if let (Some(at), Some((index, _))) = (at, found) {
            self.streams[index].next = at + (taken.end - taken.start);
        }
        Some(taken)
    }

    /// The stream that guest cluster `at` belongs to, and `true`; or one that begins with it. That takes over what an
    /// older one has kept, if it takes its place.
    fn find(&mut self, at: u64) -> (usize, bool) {
        let goes_on = |stream: &Stream| stream.next.abs_diff(at) <= SLACK;
        if let Some(index) = self.streams.iter().position(goes_on) {
            return (index, true);
        }
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(Stream::default());
            return (self.streams.len() - 1, false);
        }
        let oldest = (0..STREAMS_MAX).min_by_key(|&index| self.streams[index].used).unwrap_or(0);
        self.streams[oldest].next_clusters = 0;
        (oldest, false)
    }
}

/// Up to `want` clusters from the start of a range.
fn cut(from: &mut Range<u64>, want: u64) -> Option<Range<u64>> {
    let taken = from.start..from.end.min(from.start + want);
    from.start = taken.end;
    (!taken.is_empty()).then_some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of pieces that the clusters of each of these guest ranges, written in turns one cluster at a time, lie in.
    fn pieces_of(starts: &[u64], clusters: u64, most: u64) -> Vec<usize> {
        let mut left = 1000..1_000_000;
        let mut streams = Streams::default();
        let mut hosts = vec![Vec::new(); starts.len()];
        for i in 0..clusters {
            for (host, &start) in hosts.iter_mut().zip(starts) {
                let run = streams.take(&mut left, 1, Some(start + i), most).unwrap();
                assert_eq!(run.end - run.start, 1);
                host.push(run.start);
            }
        }
        hosts.iter().map(|host| 1 + host.windows(2).filter(|pair| pair[0] + 1 != pair[1]).count()).collect()
    }

    #[test]
    fn a_single_sequential_writer_has_one_piece_and_several_have_few() {
        assert_eq!(pieces_of(&[70], 1000, 16), [1]);
        for starts in [&[0, 5000][..], &[0, 5000, 10_000, 900, 70_000, 80_000, 33_000, 22_000]] {
            // The first cluster, regions of 4 and 8, and then 16 at a time: they were 500 pieces each.
            for pieces in pieces_of(starts, 500, 16) {
                assert!(pieces <= 3 + 500 / 16, "{pieces}");
            }
        }
    }

    #[test]
    fn each_cluster_is_handed_out_once_and_none_is_lost() {
        for seed in 1..200u64 {
            let mut state = seed;
            let mut random = move |n: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % n
            };
            let mut left = 10..10 + 1 + random(3000);
            let all = left.clone();
            let mut streams = Streams::default();
            let mut next = [0u64; 12];
            let mut taken = Vec::new();
            loop {
                let stream = random(12) as usize;
                let (want, jumps) = (1 + random(5), random(20) == 0);
                next[stream] = if jumps { random(1 << 20) } else { next[stream] };
                let at = (random(10) > 0).then_some(next[stream]);
                let Some(run) = streams.take(&mut left, want, at, 1 + random(40)) else { break };
                assert!(!run.is_empty() && run.end - run.start <= want);
                next[stream] += run.end - run.start;
                taken.extend(run);
                let kept: u64 = streams.kept().map(|range| range.end - range.start).sum();
                assert_eq!(taken.len() as u64 + kept + (left.end - left.start), all.end - all.start);
            }
            assert!(left.is_empty() && streams.kept().next().is_none());
            taken.sort_unstable();
            assert!(taken.into_iter().eq(all));
        }
    }
}
