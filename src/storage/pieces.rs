//! Walking a caller's list of memory pieces without copying it to the heap.

use super::{IoDst, IoSrc};

/// Pieces that fit without a heap allocation.
const INLINE: usize = 8;

/// What [`IoDst`] and [`IoSrc`] have in common.
pub trait Piece: Copy {
    /// A piece of no bytes.
    const EMPTY: Self;
    /// Length in bytes.
    fn length(&self) -> usize;
    /// Where it is in memory.
    fn address(&self) -> usize;
    /// The part `[from, from + len)`.
    fn part(&self, from: usize, len: usize) -> Self;
}

impl Piece for IoDst<'_> {
    const EMPTY: Self = IoDst::EMPTY;
    fn length(&self) -> usize {
        self.len()
    }
    fn address(&self) -> usize {
        self.base().addr()
    }
    fn part(&self, from: usize, len: usize) -> Self {
        self.slice(from, len)
    }
}

impl Piece for IoSrc<'_> {
    const EMPTY: Self = IoSrc::EMPTY;
    fn length(&self) -> usize {
        self.len()
    }
    fn address(&self) -> usize {
        self.base().addr()
    }
    fn part(&self, from: usize, len: usize) -> Self {
        self.slice(from, len)
    }
}

/// A short list of pieces.
#[derive(Clone)]
pub struct PieceList<P: Piece> {
    inline: [P; INLINE],
    used: usize,
    heap: Vec<P>, // all of them, once there are more than INLINE
}

impl<P: Piece> Default for PieceList<P> {
    fn default() -> Self {
        Self { inline: [P::EMPTY; INLINE], used: 0, heap: Vec::new() }
    }
}

impl<P: Piece> PieceList<P> {
    /// Appends a piece.
    pub fn push(&mut self, piece: P) {
        if piece.length() == 0 {
            return;
        }
        if self.heap.is_empty() && self.used < INLINE {
            self.inline[self.used] = piece;
            self.used += 1;
            return;
        }
        if self.heap.is_empty() {
            self.heap.extend_from_slice(&self.inline);
        }
        self.heap.push(piece);
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        self.used = 0;
        self.heap.clear();
    }

    /// The pieces.
    pub fn as_slice(&self) -> &[P] {
        if self.heap.is_empty() { &self.inline[..self.used] } else { &self.heap }
    }
}

/// Position in a list of pieces.
#[derive(Clone)]
pub struct PieceCursor<'p, P: Piece> {
    pieces: &'p [P],
    within: usize, // bytes of the first piece that are done
}

impl<'p, P: Piece> PieceCursor<'p, P> {
    /// At the start of `pieces`.
    pub fn new(pieces: &'p [P]) -> Self {
        Self { pieces, within: 0 }
    }

    /// Appends the next `length_bytes` to `list` and moves past them.
    pub fn take_into(&mut self, mut length_bytes: u64, list: &mut PieceList<P>) {
        while length_bytes > 0 {
            let first = self.pieces[0];
            let rest = first.length() - self.within;
            let n = (rest as u64).min(length_bytes) as usize;
            list.push(first.part(self.within, n));
            length_bytes -= n as u64;
            self.within += n;
            if self.within == first.length() {
                self.pieces = &self.pieces[1..];
                self.within = 0;
            }
        }
    }

    /// The next `length_bytes`, as a list of its own.
    pub fn take(&mut self, length_bytes: u64) -> PieceList<P> {
        let mut list = PieceList::default();
        self.take_into(length_bytes, &mut list);
        list
    }
}

/// Drops the first `skip` bytes of `pieces`.
pub fn skip_bytes<P: Piece>(pieces: &[P], mut skip: usize) -> PieceList<P> {
    let mut list = PieceList::default();
    for piece in pieces {
        let n = skip.min(piece.length());
        skip -= n;
        list.push(piece.part(n, piece.length() - n));
    }
    list
}

/// Copies `bytes` over the start of `pieces`.
pub fn scatter(bytes: &[u8], pieces: &[IoDst<'_>]) {
    let mut rest = bytes;
    for piece in pieces {
        let n = piece.len().min(rest.len());
        piece.copy_from(&rest[..n]);
        rest = &rest[n..];
    }
}

/// Copies the start of `pieces`, which are at least as long, to `bytes`.
pub fn gather(pieces: &[IoSrc<'_>], bytes: &mut [u8]) {
    let mut rest = bytes;
    for piece in pieces {
        let (part, next) = rest.split_at_mut(piece.len().min(rest.len()));
        piece.slice(0, part.len()).copy_to(part);
        rest = next;
    }
}

/// Fills everything after the first `skip` bytes of `pieces` with zeroes.
pub fn zero_from(pieces: &[IoDst<'_>], skip: usize) {
    for piece in skip_bytes(pieces, skip).as_slice() {
        piece.fill_zero();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_cuts_pieces_where_asked() {
        let mut memory: Vec<Vec<u8>> = (0..12).map(|i| vec![i; 5]).collect();
        let pieces: Vec<IoDst<'_>> = memory.iter_mut().map(|m| IoDst::from(&mut m[..])).collect();
        let mut cursor = PieceCursor::new(&pieces);
        assert_eq!(cursor.take(7).as_slice().iter().map(|p| p.len()).collect::<Vec<_>>(), [5, 2]);
        let rest = cursor.take(53);
        assert_eq!(rest.as_slice().iter().map(|p| p.len()).sum::<usize>(), 53);
        assert_eq!(rest.as_slice().len(), 11);
        zero_from(&pieces, 58);
        scatter(&[9; 6], &pieces);
        assert_eq!((memory[0][4], memory[1][0], memory[1][1]), (9, 9, 1));
        assert_eq!(memory[11], [11, 11, 11, 0, 0]);
        let pieces: Vec<IoSrc<'_>> = memory[..3].iter().map(|m| IoSrc::from(&m[..])).collect();
        let mut gathered = [0xaa; 8];
        gather(&pieces, &mut gathered[..7]);
        assert_eq!(gathered, [9, 9, 9, 9, 9, 9, 1, 0xaa]);
    }
}
