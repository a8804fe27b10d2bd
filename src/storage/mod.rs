//! Where bytes live: a file, the caller's callbacks, memory, or a simulator. Knows nothing of qcow2.
//!
//! Two seams. [`Storage`] is one open file. [`Io`] is how a pipeline reaches it: the pipelines of `image/` are
//! `async` and generic over `Io`, so the same code runs blocking ([`Blocking`], ready at the first poll), on a
//! queue, or under a simulator that decides when and how each transfer completes.

use std::future::Future;
use std::io;
use std::marker::PhantomData;

mod compute;
mod direct;
pub mod file;
pub mod hints;
pub mod lock;
pub mod memory;
pub mod pieces;
pub mod record;
pub mod sim;

pub use direct::Turns;

/// A piece of memory that a transfer writes into, laid out as `struct iovec`.
///
/// It is never turned into a Rust reference: it may be guest memory, which changes under us.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct IoDst<'a> {
    raw: libc::iovec,
    lives: PhantomData<&'a mut [u8]>,
}

/// A piece of memory that a transfer reads from, laid out as `struct iovec`. Never turned into a Rust reference.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct IoSrc<'a> {
    raw: libc::iovec,
    lives: PhantomData<&'a [u8]>,
}

// SAFETY: both are plain pointers to memory that their makers promised to keep valid; all access is by copying bytes.
unsafe impl Send for IoDst<'_> {}
// SAFETY: as above.
unsafe impl Sync for IoDst<'_> {}
// SAFETY: as above.
unsafe impl Send for IoSrc<'_> {}
// SAFETY: as above.
unsafe impl Sync for IoSrc<'_> {}

macro_rules! piece {
    ($name:ident) => {
        impl<'a> $name<'a> {
            /// A piece of no bytes.
            pub const EMPTY: Self =
                Self { raw: libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }, lives: PhantomData };

            /// A piece from a pointer and a length.
            ///
            /// # Safety
            /// `base` must stay valid for `len` bytes (for writing, if transfers write into it) as long as `'a`.
            pub unsafe fn from_raw(base: *mut u8, len: usize) -> Self {
                Self { raw: libc::iovec { iov_base: base.cast(), iov_len: len }, lives: PhantomData }
            }

            /// Length in bytes.
            #[allow(clippy::len_without_is_empty)]
            pub fn len(&self) -> usize {
                self.raw.iov_len
            }

            /// First byte.
            pub fn base(&self) -> *mut u8 {
                self.raw.iov_base.cast()
            }

            /// The part `[from, from + len)`, which must lie inside.
            pub fn slice(&self, from: usize, len: usize) -> Self {
                assert!(from <= self.len() && len <= self.len() - from, "piece out of range");
                // SAFETY: from <= len of the piece, so the pointer stays inside (or one past) the same memory.
                let base = unsafe { self.raw.iov_base.cast::<u8>().add(from) };
                Self { raw: libc::iovec { iov_base: base.cast(), iov_len: len }, lives: PhantomData }
            }
        }
    };
}
piece!(IoDst);
piece!(IoSrc);

impl<'a> From<&'a mut [u8]> for IoDst<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self { raw: libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }, lives: PhantomData }
    }
}

impl<'a> From<&'a [u8]> for IoSrc<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self {
            raw: libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() },
            lives: PhantomData,
        }
    }
}

impl IoDst<'_> {
    /// Fills the piece with zeroes.
    pub fn fill_zero(&self) {
        if self.len() == 0 {
            return;
        }
        // SAFETY: the maker of the piece promised valid memory of that length.
        unsafe { std::ptr::write_bytes(self.base(), 0, self.len()) }
    }

    /// Copies `bytes` to the start of the piece, which must be at least as long.
    pub fn copy_from(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len(), "copy past the end of a piece");
        // SAFETY: valid memory by the maker's promise, checked length; `copy` allows any overlap.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.base(), bytes.len()) }
    }
}

/// How much of a source is looked at at once, as a copy.
const LOOK_BYTES: usize = 4096;

impl IoSrc<'_> {
    /// Whether all bytes are zero. Each is looked at once, in a copy, so that memory which changes meanwhile counts as
    /// what it was at one moment.
    pub fn is_zero(&self) -> bool {
        let mut copy = [0u8; LOOK_BYTES];
        (0..self.len()).step_by(LOOK_BYTES).all(|at| {
            let n = LOOK_BYTES.min(self.len() - at);
            self.slice(at, n).copy_to(&mut copy[..n]);
            // A sum instead of a search: it takes whole vectors at once.
            copy[..n].iter().fold(0, |sum, byte| sum | byte) == 0
        })
    }

    /// Copies the start of the piece to `bytes`, which must be at most as long.
    pub fn copy_to(&self, bytes: &mut [u8]) {
        assert!(bytes.len() <= self.len(), "copy past the end of a piece");
        // SAFETY: valid memory by the maker's promise, checked length; `copy` allows any overlap.
        unsafe { std::ptr::copy(self.base(), bytes.as_mut_ptr(), bytes.len()) }
    }
}

/// Total length of a list of pieces (they are at most `IOV_MAX` pieces of memory that exists: no overflow).
pub fn total_dst(pieces: &[IoDst<'_>]) -> u64 {
    pieces.iter().map(|p| p.len() as u64).sum()
}

/// As [`total_dst`], for sources.
pub fn total_src(pieces: &[IoSrc<'_>]) -> u64 {
    pieces.iter().map(|p| p.len() as u64).sum()
}

/// Who a storage is, so that a backing chain that comes back to a file is noticed: device and inode.
pub type Identity = (u64, u64);

/// One open file, or what plays its part. Called from any number of threads at once.
///
/// Implementations retry interrupted calls and finish short ones themselves.
pub trait Storage: Send + Sync {
    /// Reads from `offset` until the pieces are full or the storage ends; returns the bytes read. The end of a read may meet
    /// a write that is under way (the sector in which a compressed cluster ends is where the next one begins): what it
    /// finds of that does not matter.
    fn read(&self, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize>;

    /// Writes all pieces at `offset`, growing the storage if need be. Waits for its turn, where there are [`Turns`].
    fn write(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()>;

    /// Makes everything durable that was written before the call.
    fn flush(&self) -> io::Result<()>;

    /// Size in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Sets the size; new bytes read as zero.
    fn truncate(&self, size: u64) -> io::Result<()>;

    /// Makes the size at least `size`, never less, with as little else as can be; new bytes read as zero. Other than
    /// [`Storage::truncate`], it may be called among writes that make the storage longer. Optional.
    fn extend(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Gives up the space of a range, which reads as zeroes afterwards. Optional: space is all that is lost without it.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Makes sure that a range has space, so that writing to it cannot fail for want of it. What it held stays; what lay
    /// past the end reads as zeroes. Optional: `EOPNOTSUPP` means that only writing to it allocates.
    fn allocate(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Takes the locks that go with a way of using the storage; `false`: somebody else's use contradicts. A storage
    /// that nobody else can reach has nothing to lock.
    fn lock(&self, mode: lock::LockMode) -> io::Result<bool> {
        let _ = mode;
        Ok(true)
    }

    /// Gives back what [`Storage::lock`] took.
    fn unlock(&self) {}

    /// The descriptor of a file on which positioned calls do what the functions above do, for drivers that make them
    /// in another way: reads that [`Storage::accepts_raw_read`], and writes that [`Storage::accepts_raw_write`], in their
    /// turn.
    fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }

    /// Whether a read may go to the descriptor as it is.
    fn accepts_raw_read(&self, pieces: &[IoDst<'_>], offset: u64) -> bool {
        let _ = (pieces, offset);
        true
    }

    /// Whether a write may go to the descriptor as it is.
    fn accepts_raw_write(&self, pieces: &[IoSrc<'_>], offset: u64) -> bool {
        let _ = (pieces, offset);
        true
    }

    /// What keeps writes apart that must not be under way at once; `None`: any may. A driver takes the turn of a write,
    /// keeps it until the write has ended, and makes it with the descriptor or [`Storage::write_in_turn`]: so it waits as
    /// requests wait for each other, and not in a call, in which nobody can be helped.
    fn turns(&self) -> Option<&Turns> {
        None
    }

    /// As [`Storage::write`], for who has the turn.
    fn write_in_turn(&self, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        self.write(pieces, offset)
    }

    /// From now on, transfers leave the page cache of the system out.
    fn avoid_page_cache(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }

    /// Bytes that the storage occupies, where that is known.
    fn allocated_bytes(&self) -> Option<u64> {
        None
    }

    /// Who this is, where that is known.
    fn identity(&self) -> Option<Identity> {
        None
    }
}

/// How a pipeline reaches a storage. See the module text.
pub trait Io: Sync {
    /// As [`Storage::read`].
    fn read(&self, on: &dyn Storage, pieces: &[IoDst<'_>], offset: u64) -> impl Future<Output = io::Result<usize>>;

    /// As [`Storage::write`].
    fn write(&self, on: &dyn Storage, pieces: &[IoSrc<'_>], offset: u64) -> impl Future<Output = io::Result<()>>;

    /// As [`Storage::flush`].
    fn flush(&self, on: &dyn Storage) -> impl Future<Output = io::Result<()>>;

    /// As [`Storage::punch_hole`].
    fn punch_hole(&self, on: &dyn Storage, offset: u64, length: u64) -> impl Future<Output = io::Result<()>> {
        async move { on.punch_hole(offset, length) }
    }

    /// Calls `work`, which does no I/O and waits for nobody, for each part from 0 to `parts`: one after the other, or on
    /// several threads at once. A part takes about `part_micros` microseconds. What it panics with ends the pipeline.
    fn compute(&self, parts: usize, part_micros: u64, work: &(dyn Fn(usize) + Sync)) -> impl Future<Output = ()> {
        let _ = part_micros;
        async move { (0..parts).for_each(work) }
    }
}

/// Inline I/O in the calling thread: every future is ready at its first poll. What takes long to compute is shared with
/// a few threads that live as long as that.
#[derive(Debug, Clone, Copy, Default)]
pub struct Blocking;

impl Io for Blocking {
    #[inline]
    async fn read(&self, on: &dyn Storage, pieces: &[IoDst<'_>], offset: u64) -> io::Result<usize> {
        on.read(pieces, offset)
    }

    #[inline]
    async fn write(&self, on: &dyn Storage, pieces: &[IoSrc<'_>], offset: u64) -> io::Result<()> {
        let Some(turns) = on.turns() else { return on.write(pieces, offset) };
        let _turn = match turns.try_take(pieces, offset) {
            Some(turn) => turn,
            None => Box::pin(turns.take(pieces, offset)).await, // so that it takes no room in every write
        };
        on.write_in_turn(pieces, offset)
    }

    #[inline]
    async fn flush(&self, on: &dyn Storage) -> io::Result<()> {
        on.flush()
    }

    async fn compute(&self, parts: usize, part_micros: u64, work: &(dyn Fn(usize) + Sync)) {
        compute::on_threads(parts, part_micros, work);
    }
}
