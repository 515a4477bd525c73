namespace MiniCpmNative.Kernels.Cuda;

/// <summary>
/// One kernel and one product with known results, as a device is opened: what computes zeros, or
/// nothing, is found before a training goes through with it.
/// </summary>
public static class CudaCheck
{
    /// <exception cref="CudaUnavailableException">The device does not compute.</exception>
    public static void Run(CudaDevice device)
    {
        Tensor ones = device.Allocate(new Spec(device.Activations, new Shape(8, 8)), "check"),
            sums = device.Allocate(ones.Spec, "check");
        // By a kernel: 1 is no pattern of bytes that memory can be set to.
        device.Fill(ones, 1);
        device.Multiply(ones, ones, sums, 1, 0);
        float[] filled = device.ReadFloats(ones), product = device.ReadFloats(sums);
        int wrong = Array.FindIndex(filled, value => value != 1);
        if (wrong >= 0) throw Broken("a kernel", filled[wrong], 1);
        wrong = Array.FindIndex(product, value => value != 8);
        if (wrong >= 0) throw Broken("a product", product[wrong], 8);

        CudaUnavailableException Broken(string what, float got, float expected) => new(
            FormattableString.Invariant(
                $"cuda: {device.Context.Name} does not compute: {what} gives {got}, expected {expected}; ")
            + "the card, its driver or a library is damaged");
    }
}
