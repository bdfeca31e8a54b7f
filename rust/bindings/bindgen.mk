# SPDX-License-Identifier: GPL-2.0-only
#
# bindgen, as rust/Makefile of the kernel runs it, for headers of our choice.

# GCC's options that libclang does not know are what the kernel says they are.
bindgen_skip_c_flags := $(shell sed -n '/^bindgen_skip_c_flags :=/,/[^\\]$$/p' \
	$(srctree)/rust/Makefile | sed -e 's/^bindgen_skip_c_flags :=//' -e 's/\\$$//')
bindgen_c_flags = $(if $(CONFIG_CC_IS_CLANG),$(c_flags), \
	$(filter-out $(bindgen_skip_c_flags),$(c_flags)) -w --target=x86_64-linux-gnu)
bindgen_kernel_flags := $(shell grep -Ev '^\#|^$$' $(srctree)/rust/bindgen_parameters)

quiet_cmd_bindgen_ext = BINDGEN $@
      cmd_bindgen_ext = \
	mkdir -p $(dir $@); \
	$(BINDGEN) $< $(bindgen_kernel_flags) $(bindgen_ext_flags) --rust-target 1.85 \
		--use-core --with-derive-default --ctypes-prefix ffi --no-layout-tests \
		--no-debug '.*' --enable-function-attribute-detection \
		-o $@ -- $(filter-out $(CC_FLAGS_LTO),$(bindgen_c_flags)) \
		-fno-builtin -D__BINDGEN__ -DMODULE \
		-Wno-missing-prototypes -Wno-missing-declarations \
	$(bindgen_ext_edit)

bindings := $(obj)/rust/bindings

# Whole files are taken, and none of the files that they include. Types that the
# stock bindings have too are left to them: those of Xen in a kernel that can be dom0,
# for there <xen/xen.h>, which other headers include, includes the interface.
bindgen_xen_types := $(if $(CONFIG_XEN_DOM0),--blocklist-type domid_t, \
	$(patsubst %,--allowlist-file .*/include/asm/%,xen/interface.h xen/interface_64.h pvclock-abi.h) \
	--no-copy xen_pfn_t)
$(bindings)/headers_generated.rs: private bindgen_ext_flags = \
	$(shell sed -n 's,^.include <\(.*\)>.*,--allowlist-file .*/include/\1,p' \
		$(src)/rust/bindings/headers.h) \
	--no-recursive-allowlist --blocklist-type bio_vec $(bindgen_xen_types)
$(bindings)/headers_generated.rs: $(src)/rust/bindings/headers.h FORCE
	$(call if_changed_dep,bindgen_ext)

$(bindings)/helpers_generated.rs: private bindgen_ext_flags = \
	--blocklist-type '.*' --allowlist-var '' --allowlist-function 'rust_helper_.*'
$(bindings)/helpers_generated.rs: private bindgen_ext_edit = ; \
	sed -Ei 's/pub fn rust_helper_([a-zA-Z0-9_]*)/\#[link_name="rust_helper_\1"]\n    pub fn \1/g' $@
$(bindings)/helpers_generated.rs: $(src)/rust/helpers/helpers.c FORCE
	$(call if_changed_dep,bindgen_ext)

targets += rust/bindings/headers_generated.rs rust/bindings/helpers_generated.rs

$(obj)/rust/bindings/bindings_ext.o: $(bindings)/headers_generated.rs \
	$(bindings)/helpers_generated.rs
