// SPDX-License-Identifier: GPL-2.0-only

#include <linux/bio.h>

struct bio_vec rust_helper_bio_data_next(const struct bio *bio,
					 struct bvec_iter *iter)
{
	struct bio_vec bvec = bvec_iter_bvec(bio->bi_io_vec, *iter);

	bvec_iter_advance_single(bio->bi_io_vec, iter, bvec.bv_len);
	return bvec;
}
