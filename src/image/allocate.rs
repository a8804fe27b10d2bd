//! Space ahead: ranges of the file that hold zeroes and take up room before anything is written to them.

use super::progress::Progress;
use crate::error::{Error, IoOp, Result};
use crate::storage::{Io, IoSrc, Storage};

/// Zeroes to write come from here.
pub(super) static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
/// Pieces of zeroes in one write.
pub(super) const ZERO_PIECES: usize = 16;
/// Largest range that is allocated in one call, so that progress can be told.
const STEP_BYTES: u64 = 256 << 20;

/// Zeroes as pieces of one write: at most a MiB of them. Returns how many bytes.
pub(super) fn zero_pieces(pieces: &mut [IoSrc<'static>; ZERO_PIECES], length: u64) -> u64 {
    let n = length.min((ZEROES.len() * ZERO_PIECES) as u64);
    let mut left = n as usize;
    for piece in pieces {
        let part = left.min(ZEROES.len());
        *piece = IoSrc::from(&ZEROES[..part]);
        left -= part;
    }
    n
}

/// Makes a range of the file that reads as zeroes take up space. Where the storage cannot do that by itself, zeroes are
/// written.
pub(super) async fn allocate<I: Io>(
    io: &I,
    storage: &dyn Storage,
    offset: u64,
    length: u64,
    progress: &Progress<'_>,
) -> Result<()> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let n = STEP_BYTES.min(end - at);
        match storage.allocate(at, n) {
            Ok(()) => progress.advance(n)?,
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                write_zeroes(io, storage, at, n, progress).await?;
            }
            Err(e) => return Err(Error::io(IoOp::Allocate, at, &e)),
        }
        at += n;
    }
    Ok(())
}

/// Writes zeroes to a range of the file.
pub(super) async fn write_zeroes<I: Io>(
    io: &I,
    storage: &dyn Storage,
    offset: u64,
    length: u64,
    progress: &Progress<'_>,
) -> Result<()> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        let mut pieces = [IoSrc::EMPTY; ZERO_PIECES];
        let n = zero_pieces(&mut pieces, end - at);
        io.write(storage, &pieces, at).await.map_err(|e| Error::io(IoOp::Write, at, &e))?;
        progress.advance(n)?;
        at += n;
    }
    Ok(())
}
