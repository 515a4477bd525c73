namespace MiniCpmNative.Kernels;

/// <summary>Memory of a step for tensors that do not die in the order of a stack.</summary>
public interface ITensorPool
{
    /// <summary>A buffer of undefined content.</summary>
    /// <exception cref="DeviceMemoryException">The step's memory is full.</exception>
    Tensor Take(Spec spec);

    /// <summary>All work on it is queued.</summary>
    void Return(Tensor tensor);
}
