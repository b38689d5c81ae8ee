/* The module of this library, after its METHODS and MODULE_DOC. Included once by each. */
static PyModuleDef_Slot SLOTS[] = {
    {Py_mod_exec, (void *)begin},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef DEFINITION = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernels",
    .m_doc = MODULE_DOC,
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&DEFINITION);
}
