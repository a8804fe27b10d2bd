//! zlib-rs and zstd with the settings of the library, each with a state that is used again: what compressed clusters
//! cost at least. One state belongs to one thread.

/// States for one thread.
pub struct Codec {
    zstd: bool,
    inflate: zlib_rs::Inflate,
    deflate: zlib_rs::Deflate,
    unpack: zstd_safe::DCtx<'static>,
    pack: zstd_safe::CCtx<'static>,
}

/// A new state; it lives as long as the process.
#[unsafe(no_mangle)]
pub extern "C" fn codec_new(zstd: bool) -> *mut Codec {
    let config = zlib_rs::DeflateConfig { level: 6, window_bits: -12, mem_level: 9, ..Default::default() };
    Box::into_raw(Box::new(Codec {
        zstd,
        inflate: zlib_rs::Inflate::new(false, 15),
        deflate: zlib_rs::Deflate::new_with_config(config),
        unpack: zstd_safe::DCtx::create(),
        pack: zstd_safe::CCtx::create(),
    }))
}

/// Compresses one cluster; returns how long it has become, or 0 if there is no room for that.
///
/// # Safety
/// A state of this thread, and valid memory of these lengths.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn codec_pack(
    codec: *mut Codec,
    from: *const u8,
    length: usize,
    to: *mut u8,
    room: usize,
) -> usize {
    // SAFETY: the caller's promise.
    let (codec, from, to) =
        unsafe { (&mut *codec, std::slice::from_raw_parts(from, length), std::slice::from_raw_parts_mut(to, room)) };
    if codec.zstd {
        return codec.pack.compress(to, from, zstd_safe::CLEVEL_DEFAULT).unwrap_or(0);
    }
    codec.deflate.reset();
    match codec.deflate.compress(from, to, zlib_rs::DeflateFlush::Finish) {
        Ok(zlib_rs::Status::StreamEnd) => codec.deflate.total_out() as usize,
        _ => 0,
    }
}

/// Decompresses one cluster; whether it came out as a whole.
///
/// # Safety
/// As for [`codec_pack`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn codec_unpack(
    codec: *mut Codec,
    from: *const u8,
    length: usize,
    to: *mut u8,
    room: usize,
) -> bool {
    // SAFETY: the caller's promise.
    let (codec, from, to) =
        unsafe { (&mut *codec, std::slice::from_raw_parts(from, length), std::slice::from_raw_parts_mut(to, room)) };
    if codec.zstd {
        return codec.unpack.decompress(to, from) == Ok(room);
    }
    codec.inflate.reset(false);
    let status = codec.inflate.decompress(from, to, zlib_rs::InflateFlush::Finish);
    status.is_ok() && codec.inflate.total_out() == room as u64
}
