//! Queues
//!
//! Many requests of one thread under way at once: what an event loop of a hypervisor or a server wants. A request is
//! prepared, submitted together with others, and reaped once it has ended. Nothing happens behind the caller's back: no
//! callback is called, and no thread works for a queue that runs on io_uring but those that compress and decompress: all
//! queues of the process share these, one for each processor, from the first such work until the last queue is freed. An
//! owner who waits in qcow2_queue_reap() without a time limit takes a share of that work. Requests go on while their
//! owner is in qcow2_queue_submit() or qcow2_queue_reap(), and where any thread waits for them, in a blocking call or for
//! another queue, on the same image or on a snapshot of it that was opened beside it.
//!
//! Requests of a queue have no order among each other: who wants one after the other reaps the first before submitting
//! the second. Two requests under way that overlap, and of which one writes, give each byte one of the two values.

use std::sync::Arc;
use std::time::Duration;

use libc::{c_int, c_void, iovec};

use super::arguments::{flags as check_flags, out};
use super::boundary::{call, null};
use super::error::record;
use super::image::qcow2_image;
use super::io::{QCOW2_FUA, vector, write_flags, zero_flags};
use crate::error::{Error, Result};
use crate::format::GuestOffset;
use crate::queue::{Backend, Cancelled, Completion, Queue, Request};
use crate::storage::{IoDst, IoSrc};

/// A queue of requests on an image. It belongs to one thread at a time.
pub struct qcow2_queue {
    queue: Queue,
}

/// What performs the transfers of a queue: io_uring where it is to be had (Linux 5.11, and no sandbox that forbids it),
/// threads otherwise. qcow2_queue_backend() says which it became.
pub const QCOW2_QUEUE_AUTO: u32 = 0;
/// io_uring, or no queue at all.
pub const QCOW2_QUEUE_IO_URING: u32 = 1;
/// A few threads that make blocking calls.
pub const QCOW2_QUEUE_THREADS: u32 = 2;

/// A request that has ended. The size of this struct never changes: room to grow is in its reserved members.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct qcow2_completion {
    /// The number that the request was prepared with.
    pub user_data: u64,
    /// 0, or the negative errno that the blocking call would have returned.
    pub result: i32,
    /// 0, or a QCOW2_ERR_ number that says why.
    pub error_code: i32,
    /// Zero.
    pub reserved: [u64; 2],
}

/// Makes a queue on an image.
///
/// image:   the handle. It may be closed before the queue is freed: requests under way then end first, and later ones
///          fail
/// depth:   how many requests may be between being prepared and being reaped: 1 to 4096
/// backend: QCOW2_QUEUE_AUTO, or which one it must be
/// queue:   where the queue goes; set to NULL on an error
///
/// Any number of queues, and blocking calls, may use one image at once. The caller frees the queue with
/// qcow2_queue_free().
/// Returns 0 or a negative errno: -EINVAL a depth or a backend out of range; what io_uring_setup(2) returned.
/// Thread-safe. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_new(
    image: *mut qcow2_image,
    depth: u32,
    backend: u32,
    queue: *mut *mut qcow2_queue,
) -> c_int {
    call(|| {
        // SAFETY: NULL or valid for a write by the manual above.
        let queue = unsafe { out("queue", queue, std::ptr::null_mut()) }?;
        // SAFETY: NULL or an open handle by the manual above.
        let image = unsafe { image.as_ref() }.ok_or_else(|| null("image"))?;
        let backend = match backend {
            QCOW2_QUEUE_AUTO => Backend::Auto,
            QCOW2_QUEUE_IO_URING => Backend::IoUring,
            QCOW2_QUEUE_THREADS => Backend::Threads,
            _ => {
                let expected = "one of the QCOW2_QUEUE_ numbers";
                return Err(Error::ArgumentValue { name: "backend", value: backend.to_string(), expected });
            }
        };
        let made = Queue::new(Arc::clone(&image.image), depth, backend)?;
        *queue = Box::into_raw(Box::new(qcow2_queue { queue: made }));
        Ok(())
    })
}

/// Frees a queue. Waits until every request that was submitted has ended, so that the buffers are the caller's again;
/// requests that were only prepared never happen, and completions that were not reaped are lost.
///
/// queue:  the queue, not to be used any more; NULL is a no-op
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_free(queue: *mut qcow2_queue) {
    if !queue.is_null() {
        call(|| {
            // SAFETY: came from Box::into_raw in `qcow2_queue_new`, and nobody uses it any more (manual above).
            drop(unsafe { Box::from_raw(queue) });
            Ok(())
        });
    }
}

/// What performs the transfers of a queue: QCOW2_QUEUE_IO_URING or QCOW2_QUEUE_THREADS, or a negative errno.
///
/// queue:  the queue
///
/// Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_backend(queue: *const qcow2_queue) -> c_int {
    // SAFETY: NULL or a queue by the manual above.
    match unsafe { queue.as_ref() } {
        None => record(&null("queue")),
        Some(queue) if queue.queue.backend() == Backend::IoUring => QCOW2_QUEUE_IO_URING as c_int,
        Some(_) => QCOW2_QUEUE_THREADS as c_int,
    }
}

/// Runs the body of a call on a queue.
///
/// # Safety
/// `queue` is NULL or a queue that nobody else uses meanwhile.
unsafe fn call_on_queue(queue: *mut qcow2_queue, body: impl FnOnce(&mut Queue) -> Result<()>) -> c_int {
    call(|| {
        // SAFETY: the caller's promise.
        let queue = unsafe { queue.as_mut() }.ok_or_else(|| null("queue"))?;
        body(&mut queue.queue)
    })
}

/// Prepares a request.
///
/// # Safety
/// As [`call_on_queue`].
unsafe fn prepare(queue: *mut qcow2_queue, user_data: u64, request: impl FnOnce() -> Result<Request>) -> c_int {
    let body = |queue: &mut Queue| queue.push(request()?, user_data).map_err(|_| Error::QueueFull);
    // SAFETY: the caller's promise.
    unsafe { call_on_queue(queue, body) }
}

/// Prepares a read. As for all that follows: nothing happens before qcow2_queue_submit() or qcow2_queue_reap().
///
/// queue:     the queue
/// iov:       the buffers, filled one after the other; the array may be reused at once, the buffers must stay valid and
///            be left alone until the request has been reaped
/// iovcnt:    how many; any number
/// offset:    guest offset in bytes
/// flags:     0
/// user_data: comes back with the completion; the library does nothing with it
///
/// Returns 0 or a negative errno: -EAGAIN as many requests as the queue is deep are prepared or not reaped; -EINVAL
/// NULL pointers or unknown flags. All other errors are the completion's. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_readv(
    queue: *mut qcow2_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    user_data: u64,
) -> c_int {
    let request = || {
        check_flags(flags, 0)?;
        // SAFETY: a vector of iovcnt buffers by the manual above, read during this call only.
        let pieces = unsafe { vector(iov, iovcnt) }?;
        let piece = |p: &iovec| {
            // SAFETY: writable until the request has been reaped, by the manual above.
            unsafe { IoDst::from_raw(p.iov_base.cast(), p.iov_len) }
        };
        Ok(Request::Read(pieces.iter().map(piece).collect(), GuestOffset(offset)))
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { prepare(queue, user_data, request) }
}

/// Prepares a write.
///
/// queue:     the queue
/// iov:       the buffers; the array may be reused at once, the buffers must stay valid and unchanged until the request
///            has been reaped
/// iovcnt:    how many; any number
/// offset:    guest offset in bytes
/// flags:     as for qcow2_pwrite()
/// user_data: comes back with the completion
///
/// Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_writev(
    queue: *mut qcow2_queue,
    iov: *const iovec,
    iovcnt: c_int,
    offset: u64,
    flags: u32,
    user_data: u64,
) -> c_int {
    let request = || {
        let flags = write_flags(flags)?;
        // SAFETY: a vector of iovcnt buffers by the manual above, read during this call only.
        let pieces = unsafe { vector(iov, iovcnt) }?;
        let piece = |p: &iovec| {
            // SAFETY: readable until the request has been reaped, by the manual above.
            unsafe { IoSrc::from_raw(p.iov_base.cast(), p.iov_len) }
        };
        Ok(Request::Write(pieces.iter().map(piece).collect(), GuestOffset(offset), flags))
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { prepare(queue, user_data, request) }
}

/// Prepares a flush: it makes everything durable whose completion had been, or could have been, reaped when the flush
/// was submitted.
///
/// queue:     the queue
/// user_data: comes back with the completion
///
/// Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_flush(queue: *mut qcow2_queue, user_data: u64) -> c_int {
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { prepare(queue, user_data, || Ok(Request::Flush)) }
}

/// Prepares the writing of zeroes.
///
/// queue:     the queue
/// offset:    guest offset in bytes
/// length:    bytes
/// flags:     as for qcow2_write_zeroes()
/// user_data: comes back with the completion
///
/// Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_write_zeroes(
    queue: *mut qcow2_queue,
    offset: u64,
    length: u64,
    flags: u32,
    user_data: u64,
) -> c_int {
    let request = || Ok(Request::WriteZeroes(GuestOffset(offset), length, zero_flags(flags)?));
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { prepare(queue, user_data, request) }
}

/// Prepares a discard.
///
/// queue:     the queue
/// offset:    guest offset in bytes
/// length:    bytes
/// flags:     as for qcow2_discard()
/// user_data: comes back with the completion
///
/// Returns 0 or a negative errno, as qcow2_queue_readv(). Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_discard(
    queue: *mut qcow2_queue,
    offset: u64,
    length: u64,
    flags: u32,
    user_data: u64,
) -> c_int {
    let request = || {
        check_flags(flags, 0)?;
        Ok(Request::Discard(GuestOffset(offset), length))
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { prepare(queue, user_data, request) }
}

/// Begins everything that was prepared, with as few system calls as possible. What needs no waiting (what the page
/// cache has, zeroes, an error) ends at once.
///
/// queue:  the queue
///
/// Returns how many requests have ended and can be reaped now, or a negative errno. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_submit(queue: *mut qcow2_queue) -> c_int {
    let mut ended = 0;
    let body = |queue: &mut Queue| {
        ended = queue.submit();
        Ok(())
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    match unsafe { call_on_queue(queue, body) } {
        0 => c_int::try_from(ended).unwrap_or(c_int::MAX),
        error => error,
    }
}

/// Takes requests that have ended, those that ended first before the others. What was prepared is submitted first.
///
/// queue:       the queue
/// completions: where they go: room for max
/// max:         how many there is room for
/// min:         waits until there are so many, or as many as are under way, or the time is over; 0 does not wait
/// timeout_ns:  how long to wait at most, in nanoseconds; negative: as long as it takes
///
/// Returns how many were filled in, or a negative errno (then none was taken). What went wrong with the last request
/// that failed among them, qcow2_last_error() tells in words. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_reap(
    queue: *mut qcow2_queue,
    completions: *mut qcow2_completion,
    max: u32,
    min: u32,
    timeout_ns: i64,
) -> c_int {
    let mut filled = 0;
    let body = |queue: &mut Queue| {
        if completions.is_null() && max > 0 {
            return Err(null("completions"));
        }
        let timeout = u64::try_from(timeout_ns).ok().map(Duration::from_nanos);
        let max = max.min(c_int::MAX as u32) as usize;
        queue.reap(max, min as usize, timeout, |ended| {
            // SAFETY: room for `max` structs by the manual above, and fewer have been filled in.
            unsafe { completions.add(filled).write(completion(&ended)) };
            filled += 1;
        })?;
        Ok(())
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    match unsafe { call_on_queue(queue, body) } {
        0 => filled as c_int,
        error => error,
    }
}

fn completion(ended: &Completion) -> qcow2_completion {
    let (result, error_code) = match &ended.result {
        Ok(()) => (0, 0),
        Err(error) => (record(error), error.code() as i32),
    };
    qcow2_completion { user_data: ended.user_data, result, error_code, reserved: [0; 2] }
}

/// A descriptor for poll(2) or epoll(7): readable when requests have ended, or when some can go on: then
/// qcow2_queue_reap() is to be called (which makes it unreadable again; nobody needs to read from it).
///
/// queue:  the queue, to which the descriptor belongs; it is made at the first call
///
/// Returns the descriptor or a negative errno. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_fd(queue: *mut qcow2_queue) -> c_int {
    let mut fd = -1;
    let body = |queue: &mut Queue| {
        fd = queue.fd()?;
        Ok(())
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    match unsafe { call_on_queue(queue, body) } {
        0 => fd,
        error => error,
    }
}

/// Takes back a request that has been prepared and not submitted. It completes with -ECANCELED. A request that is under
/// way is not interrupted.
///
/// queue:     the queue
/// user_data: of the request; if several have it, the one that was prepared first
///
/// Returns 0 or a negative errno: -EALREADY it has been submitted; -ENOENT there is none. Since 0.1.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qcow2_queue_cancel(queue: *mut qcow2_queue, user_data: u64) -> c_int {
    let body = |queue: &mut Queue| match queue.cancel(user_data) {
        Cancelled::Yes => Ok(()),
        Cancelled::TooLate => Err(Error::NotCancelled { submitted: true }),
        Cancelled::Unknown => Err(Error::NotCancelled { submitted: false }),
    };
    // SAFETY: NULL or a queue of the calling thread by the manual above.
    unsafe { call_on_queue(queue, body) }
}

const _: () = {
    assert!(size_of::<qcow2_completion>() == 32);
    assert!(size_of::<*mut c_void>() == 8 && QCOW2_FUA == 1);
};
