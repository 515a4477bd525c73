using MiniCpmNative.Kernels;

namespace MiniCpmNative.Engine.Model;

/// <summary>Sees named intermediate tensors of a forward pass; they end with their scope.</summary>
public interface ITensorProbe
{
    void Visit(string name, Tensor tensor);

    void Visit(string name, int layer, Tensor tensor) => Visit($"{name}.{layer}", tensor);
}
