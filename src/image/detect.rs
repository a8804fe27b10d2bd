//! Zeroes that a guest writes as data: they are found and become zero entries, which take no space.
//!
//! The guest's memory may change while it is looked at. What was seen as zeroes is written as zeroes of our own, and
//! everything else is written from the guest's memory: whatever changes meanwhile, each byte on the disk has one of the
//! values that the memory had during the call.

use super::Image;
use super::options::DetectZeroes;
use super::zero::ZeroFlags;
use crate::error::Result;
use crate::format::GuestOffset;
use crate::storage::pieces::{PieceCursor, PieceList};
use crate::storage::{Io, IoSrc};

/// What was seen of a part of the payload.
struct Run<'a> {
    pieces: PieceList<IoSrc<'a>>,
    length: u64,
    is_zero: bool,
}

/// The next part of the payload that is all zeroes, or has none, subcluster by subcluster. A subcluster that is covered
/// in part counts with the part that is.
fn next_run<'a>(cursor: &mut PieceCursor<'_, IoSrc<'a>>, mut at: u64, length: u64, unit: u64) -> Run<'a> {
    let mut run = Run { pieces: PieceList::default(), length: 0, is_zero: false };
    while run.length < length {
        let n = (unit - at % unit).min(length - run.length);
        let mut ahead = cursor.clone();
        let part = ahead.take(n);
        let is_zero = part.as_slice().iter().all(IoSrc::is_zero);
        if run.length > 0 && is_zero != run.is_zero {
            break;
        }
        run.is_zero = is_zero;
        part.as_slice().iter().for_each(|piece| run.pieces.push(*piece));
        run.length += n;
        at += n;
        *cursor = ahead;
    }
    run
}

impl Image {
    /// As [`Image::write_range`], with zeroes found.
    pub(super) async fn write_detecting<I: Io>(
        &self,
        io: &I,
        pieces: &[IoSrc<'_>],
        offset: GuestOffset,
        length: u64,
    ) -> Result<bool> {
        let unit = self.active().geometry.subcluster_size_bytes();
        let flags = ZeroFlags { may_unmap: self.detect_zeroes == DetectZeroes::Unmap, ..ZeroFlags::default() };
        let mut cursor = PieceCursor::new(pieces);
        let (mut at, mut left, mut changed) = (offset, length, false);
        while left > 0 {
            let run = next_run(&mut cursor, at.0, left, unit);
            if run.is_zero {
                self.zero_range(io, at, run.length, flags).await?;
                changed = true;
            } else if run.length == length {
                return self.write_range(io, pieces, offset, length).await;
            } else {
                changed |= self.write_range(io, run.pieces.as_slice(), at, run.length).await?;
            }
            at = at.plus(run.length);
            left -= run.length;
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_change_at_subclusters_only() {
        let mut memory = vec![0u8; 10_000];
        memory[4096] = 1; // the payload starts 1000 bytes into the first subcluster
        memory[9_999] = 1;
        let (a, b) = memory.split_at(4097);
        let pieces = [IoSrc::from(a), IoSrc::from(b)];
        let mut cursor = PieceCursor::new(&pieces);
        let (mut at, mut left) = (1000, 10_000);
        let mut runs = Vec::new();
        while left > 0 {
            let run = next_run(&mut cursor, at, left, 2048);
            assert_eq!(crate::storage::total_src(run.pieces.as_slice()), run.length);
            runs.push((at, run.length, run.is_zero));
            at += run.length;
            left -= run.length;
        }
        assert_eq!(runs, [(1000, 3096, true), (4096, 2048, false), (6144, 4096, true), (10_240, 760, false)]);
    }
}
