//! What a file holds: sparse, and cheap to copy, since thousands of crash states are made of each moment.

use std::sync::Arc;

use super::disk::SECTOR_BYTES;

/// Contents are kept in pieces of this size; a multiple of the sector.
const CHUNK_BYTES: usize = 16 << 10;

type Chunk = [u8; CHUNK_BYTES];

/// What a piece that was never written reads as.
static ZEROES: Chunk = [0; CHUNK_BYTES];

/// Contents of a disk: bytes, and the size of the file. A clone shares all pieces until one of the two is written to.
#[derive(Debug, Clone, Default)]
pub struct DiskImage {
    /// Pieces from the start of the file on; those that are missing are zeroes. Past the size all bytes are zero.
    chunks: Vec<Option<Arc<Chunk>>>,
    /// Size of the file in bytes.
    pub size: u64,
}

impl DiskImage {
    /// A file of no bytes.
    pub const fn empty() -> Self {
        Self { chunks: Vec::new(), size: 0 }
    }

    /// Contents of a file.
    pub fn new(bytes: impl AsRef<[u8]>) -> Self {
        let bytes = bytes.as_ref();
        let chunk = |part: &[u8]| {
            (part != &ZEROES[..part.len()]).then(|| {
                let mut chunk = Arc::new(ZEROES);
                Arc::make_mut(&mut chunk)[..part.len()].copy_from_slice(part);
                chunk
            })
        };
        Self { chunks: bytes.chunks(CHUNK_BYTES).map(chunk).collect(), size: bytes.len() as u64 }
    }

    /// The file as it would be read from end to end.
    pub fn to_file(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.size as usize];
        for (chunk, target) in self.chunks.iter().zip(bytes.chunks_mut(CHUNK_BYTES)) {
            if let Some(chunk) = chunk {
                target.copy_from_slice(&chunk[..target.len()]);
            }
        }
        bytes
    }

    /// Where the pieces end: whatever follows is zeroes.
    pub fn end(&self) -> u64 {
        (self.chunks.len() * CHUNK_BYTES) as u64
    }

    /// The bytes from `at` on: as many as lie in one piece, and at most `length`. None past the [`end`](Self::end).
    pub fn part(&self, at: u64, length: usize) -> &[u8] {
        let within = (at % CHUNK_BYTES as u64) as usize;
        let end = CHUNK_BYTES.min(within.saturating_add(length));
        match self.chunks.get((at / CHUNK_BYTES as u64) as usize) {
            Some(Some(chunk)) => &chunk[within..end],
            Some(None) => &ZEROES[within..end],
            None => &[],
        }
    }

    /// Whether the piece at `at` was never written, or is past the end; and where the next one begins.
    pub fn hole(&self, at: u64) -> (bool, u64) {
        let index = at / CHUNK_BYTES as u64;
        let is_hole = self.chunks.get(index as usize).is_none_or(Option::is_none);
        (is_hole, (index + 1) * CHUNK_BYTES as u64)
    }

    /// Reads bytes; zeroes past the end.
    pub fn read(&self, at: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let part = self.part(at + done as u64, out.len() - done);
            if part.is_empty() {
                return out[done..].fill(0);
            }
            out[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        }
    }

    /// Writes bytes; the file grows where they reach past its size.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.set(at, bytes);
        self.size = self.size.max(at + bytes.len() as u64);
    }

    /// Sets bytes without changing the size.
    fn set(&mut self, at: u64, bytes: &[u8]) {
        let (mut at, mut left) = (at as usize, bytes);
        while !left.is_empty() {
            let (index, within) = (at / CHUNK_BYTES, at % CHUNK_BYTES);
            let (now, rest) = left.split_at(left.len().min(CHUNK_BYTES - within));
            if self.chunks.len() <= index {
                self.chunks.resize(index + 1, None);
            }
            let chunk = self.chunks[index].get_or_insert_with(|| Arc::new(ZEROES));
            Arc::make_mut(chunk)[within..within + now.len()].copy_from_slice(now);
            (at, left) = (at + now.len(), rest);
        }
    }

    /// Writes whole sectors of a write after which the file reached at least to `end`.
    pub(super) fn put_sectors(&mut self, first: usize, content: &[u8], end: u64) {
        let at = first * SECTOR_BYTES;
        self.set(at as u64, content);
        self.size = self.size.max(end.min((at + content.len()) as u64));
    }

    /// Makes sectors what they are in another image of which this one was a clone.
    pub(super) fn restore(&mut self, from: &Self, first: usize, sectors: usize) {
        let (mut at, end) = ((first * SECTOR_BYTES) as u64, ((first + sectors) * SECTOR_BYTES) as u64);
        while at < end && at < self.end() {
            let part = from.part(at, (end - at) as usize);
            if part.is_empty() {
                return;
            }
            self.set(at, part);
            at += part.len() as u64;
        }
    }

    /// Makes the file and its list of pieces no longer than another's.
    pub(super) fn shorten_to(&mut self, other: &Self) {
        self.chunks.truncate(other.chunks.len());
        self.size = other.size;
    }

    pub(super) fn truncate(&mut self, size: u64) {
        let (whole, within) = ((size / CHUNK_BYTES as u64) as usize, (size % CHUNK_BYTES as u64) as usize);
        self.chunks.truncate(whole + usize::from(within > 0));
        if within > 0
            && let Some(Some(last)) = self.chunks.get_mut(whole)
        {
            Arc::make_mut(last)[within..].fill(0);
        }
        self.size = size;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::sim::Rng;

    #[test]
    fn it_is_a_file_of_bytes() {
        let mut rng = Rng::new(1);
        let (mut image, mut model) = (DiskImage::empty(), Vec::new());
        for round in 0..3000u64 {
            let at = rng.below(5 * CHUNK_BYTES as u64);
            match rng.below(12) {
                0 => {
                    image.truncate(at);
                    model.resize(at as usize, 0);
                }
                1 => {
                    // A clone that is changed changes nothing here.
                    let mut other = image.clone();
                    other.put(at, &[9; 700]);
                }
                2 => image = DiskImage::new(&model),
                _ => {
                    let bytes = vec![round as u8; rng.below(2 * CHUNK_BYTES as u64) as usize];
                    let end = at as usize + bytes.len();
                    image.put(at, &bytes);
                    if model.len() < end {
                        model.resize(end, 0);
                    }
                    model[at as usize..end].copy_from_slice(&bytes);
                }
            }
            assert!(image.to_file() == model, "round {round}");
            let (from, length) = (rng.below(6 * CHUNK_BYTES as u64) as usize, rng.below(40_000) as usize);
            let mut found = vec![1; length];
            image.read(from as u64, &mut found);
            let expected: Vec<u8> = (from..from + length).map(|i| model.get(i).copied().unwrap_or(0)).collect();
            assert!(found == expected, "round {round}");
        }
    }

    #[test]
    fn what_is_restored_is_the_original_again() {
        let original = DiskImage::new(vec![7; 3 * CHUNK_BYTES + 1000]);
        let mut copy = original.clone();
        copy.put_sectors(3, &[1; 4 * SECTOR_BYTES], u64::MAX);
        copy.put_sectors(4 * CHUNK_BYTES / SECTOR_BYTES, &[1; SECTOR_BYTES], u64::MAX);
        copy.shorten_to(&original);
        copy.restore(&original, 3, 4);
        copy.restore(&original, 4 * CHUNK_BYTES / SECTOR_BYTES, 1);
        assert!(copy.to_file() == original.to_file());
        assert_eq!(copy.end(), original.end());
    }
}
